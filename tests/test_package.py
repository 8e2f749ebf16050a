"""The package as its users and readers meet it: what an import costs, what is named, who knows whom."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pronghorn

PACKAGE = Path(pronghorn.__file__).parent
REPOSITORY = Path(__file__).parents[1]

# Floors, from the ground: a file imports its own package and lower floors, never a higher one nor a neighbour.
FLOORS = [
    ("errors", "_native", "machine"),
    ("weights",),
    ("ops",),
    ("models",),
    ("engine", "text"),
    ("generation", "loading", "parallel"),
    ("llm",),
    ("async_llm", "batch", "bench", "convert", "harness"),
    ("evaluate", "serve"),
    ("mixing", "scaling", "tuning"),
    ("quantize",),
    ("cli",),
]

HEAVY = {"numpy", "torch", "tokenizers", "transformers", "asyncio", "jinja2", "tqdm"}


def imported_by(statement: str) -> dict[str, int]:
    """The modules that a fresh interpreter imports for a statement beyond its own -> own microseconds of each."""
    times: list[dict[str, int]] = []
    for code in ("pass", statement):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
        )
        rows = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE)
        times.append({name: int(own) for own, name in rows})
    return {name: own for name, own in times[1].items() if name not in times[0]}


def test_import_is_light() -> None:
    modules = imported_by("import pronghorn")
    print(f"import pronghorn: {len(modules)} modules, {sum(modules.values()) / 1000:.1f} ms")
    assert set(modules) == {"pronghorn"}


def test_command_line_starts_without_heavy_modules() -> None:
    modules = imported_by("import pronghorn.cli")
    print(f"import pronghorn.cli: {len(modules)} modules, {sum(modules.values()) / 1000:.1f} ms")
    assert not HEAVY & {name.partition(".")[0] for name in modules}


def test_all_names_are_there() -> None:
    assert len(set(pronghorn.__all__)) == len(pronghorn.__all__)
    for name in pronghorn.__all__:
        assert getattr(pronghorn, name) is not None
        assert name in dir(pronghorn)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pronghorn.nonsense


def test_versions_agree() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{pronghorn.__version__}"' in project
    assert f"## {pronghorn.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    if PACKAGE.parent == REPOSITORY / "src":
        pytest.skip("runs from the source tree: there is no installed version to compare")
    assert pronghorn.__version__ == importlib.metadata.version("pronghorn")


def imports_of(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports anywhere in it; names for the type checker alone are none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unseen = {child for node in typing for statement in node.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("pronghorn.") for name in names if name.startswith("pronghorn."))


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py" and path.parent != PACKAGE]
FILES += [path for path in sorted(PACKAGE.glob("*.py")) if not path.name.startswith("__")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_knows_a_higher_floor(path: Path) -> None:
    floor_of = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports_of(path):
        other = name.partition(".")[0]
        if other not in (own, "__version__"):
            assert floor_of[other] < floor_of[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_a_model_fits_on_three_screens(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


def test_installed_size() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 10_000_000


def commands(name: str) -> list[str]:
    """The lines of the shell blocks of a document."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]


def test_readme_opens_with_two_commands() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first = re.search(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert first
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make run", "make test"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/quality.md"])
def test_documented_commands_exist(name: str) -> None:
    """Every `make` target is in the Makefile; every `pronghorn` command is taken, with its options."""
    from pronghorn.cli import parser

    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    found = 0
    for line in commands(name):
        words = [word.strip("\"'") for word in re.findall(r'"[^"]*"|\'[^\']*\'|\S+', line.partition(" #")[0])]
        if words[:1] == ["make"]:
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), line
            found += 1
        elif words[:1] == ["pronghorn"]:
            parser().parse_args(words[1:])
            found += 1
    assert found
