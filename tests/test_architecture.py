"""What the design promises of the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxsplit.planning.plan import SCHEDULES as PLAN_SCHEDULES
from fxsplit.runtime.transports import TRANSPORTS
from fxsplit.schedules import SCHEDULES

ROOT = Path(__file__).parent.parent
LAYERS = {"fxsplit.passes": 1, "fxsplit.runtime": 2, "fxsplit.compile": 3, "fxsplit.commands": 4, "fxsplit.cli": 5}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, by its import name."""
    for folder in ("fxsplit", "passes", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / folder / "passes") in path.parents or (ROOT / folder / "runtime") in path.parents:
                continue  # the links to the folders at the top
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "fxsplit" else ("fxsplit", *parts)
            yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> set[str]:
    """What a module imports from the package, deferred imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "fxsplit"}


def layer(name: str) -> int:
    """Core, passes, runtime, compile, commands, command line: 0 to 5."""
    return max((level for prefix, level in LAYERS.items() if f"{name}.".startswith(f"{prefix}.")), default=0)


def test_imports_point_one_way() -> None:
    for name, path in modules():
        if name in ("fxsplit", "fxsplit.__main__"):
            continue
        for imported in imports(path):
            assert layer(imported) <= layer(name), f"{name} imports {imported}"


def test_no_import_cycles() -> None:
    known = dict(modules())
    graph = {
        name: {i for i in imports(path) if i in known and i != name and not name.startswith(f"{i}.")}
        for name, path in known.items()
        if name != "fxsplit"
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {name for name, path in modules() if path.name == "__init__.py"}
    assert set(listed) == found


@pytest.mark.parametrize("folder", ["passes", "runtime"])
def test_folders_are_not_imported_by_their_bare_names(folder: str) -> None:
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"import this package as fxsplit.{folder}" in result.stderr


def test_names_in_tables_are_unique_and_agree() -> None:
    assert tuple(kind.name for kind in SCHEDULES) == PLAN_SCHEDULES
    names = [kind.name for kind in TRANSPORTS]
    assert len(set(names)) == len(names)


def test_files_and_functions_are_short() -> None:
    for name, path in modules():
        source = path.read_text()
        assert len(source.splitlines()) <= 420, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node, clean=False) or ""
                lines = (node.end_lineno or node.lineno) - node.lineno - len(documented.splitlines())
                assert lines <= 65, f"{name}.{node.name} has {lines} lines"
