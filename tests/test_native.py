"""The compiled core as a whole: its own tests, its instruction sets, its stub."""

from __future__ import annotations

import ast
import importlib.resources
import os
import subprocess
import sys

import pytest

from pronghorn import _native
from pronghorn.machine import usable_processors


def test_kernels() -> None:
    """tests/native: every kernel of every instruction set that this machine has against its double-precision twin."""
    program = os.environ.get("PRONGHORN_NATIVE_TESTS")
    if not program:
        pytest.skip("PRONGHORN_NATIVE_TESTS is not set (`make test` builds the native tests and sets it)")
    command = [program, "--processes", str(usable_processors())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ", 0 failed" in done.stdout


def isa_in_child(name: str) -> subprocess.CompletedProcess[str]:
    code = "from pronghorn import _native; print(_native.isa())"
    environment = {**os.environ, "PRONGHORN_ISA": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_isa_is_the_best_or_the_one_asked_for() -> None:
    sets = _native.available_isas()
    assert sets[-1] == "generic"
    assert isa_in_child("").stdout.strip() == sets[0]
    for name in sets:
        assert isa_in_child(name).stdout.strip() == name


def test_unknown_isa_is_an_error_that_names_it() -> None:
    done = isa_in_child("pentium")
    assert done.returncode != 0
    assert "PRONGHORN_ISA=pentium" in done.stderr.splitlines()[-1]


def test_stub_names_what_the_module_has() -> None:
    stub = ast.parse(importlib.resources.files("pronghorn").joinpath("_native.pyi").read_text(encoding="utf-8"))

    def names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
        found: dict[str, ast.stmt] = {}
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node
        return found

    declared = names(stub.body)
    assert set(declared) == {name for name in dir(_native) if not name.startswith("_")}
    for name, node in declared.items():
        if isinstance(node, ast.ClassDef):
            members = {member for member in names(node.body) if not member.startswith("_")}
            assert members == {m for m in dir(getattr(_native, name)) if not m.startswith("_")}, name
