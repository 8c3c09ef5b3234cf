"""The planner is pure: it reads no clock and does no I/O, so the same problem has the same plan in a daemon and a simulator."""

import ast
from pathlib import Path

import pytest

import meshd.planner

ALLOWED = {
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "math",
    "msgspec",
    "numpy",
    "random",
    "re",
    "statistics",
    "typing",
}
OURS = ("meshd.planner", "meshd.types", "meshd.errors", "meshd.numerics")
MODULES = sorted(Path(meshd.planner.__path__[0]).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_imports_are_pure(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert name.startswith(OURS) or name.split(".")[0] in ALLOWED, name
