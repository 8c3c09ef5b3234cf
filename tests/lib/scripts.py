"""Loads a script of `tests/` as a module, so that a test can check what it generates."""

import importlib.util
from pathlib import Path
from types import ModuleType

_TESTS = Path(__file__).parents[1]


def load_script(name: str) -> ModuleType:
    """Execute `tests/<name>.py` as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, _TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
