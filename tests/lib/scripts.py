"""Loads a script of `tests/project/` as a module, so that a test can check what it generates."""

import importlib.util
from pathlib import Path
from types import ModuleType

_SCRIPTS = Path(__file__).parents[1] / "project"


def load_script(name: str) -> ModuleType:
    """Execute `tests/project/<name>.py` as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, _SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
