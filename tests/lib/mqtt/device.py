"""The reference client of docs/examples, as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).parents[3] / "docs" / "examples" / "mqtt_device.py"


def load_reference_client() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mqtt_device", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


mqtt_device = load_reference_client()
