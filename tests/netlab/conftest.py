"""Hosts in network namespaces, where the tool that makes them (`netlab.py`) is at hand and may be used."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

_BESIDE = Path(__file__).resolve().parents[2].parent / "shared/netlab/netlab.py"
"""Beside the repository, unless MESHD_NETLAB names another place."""

MakeLab = Callable[..., Any]


@pytest.fixture(scope="session")
def netlab() -> Any:
    """The module, or a skip with the reason."""
    path = Path(os.environ.get("MESHD_NETLAB", _BESIDE))
    if not path.is_file():
        pytest.skip(f"no netlab at {path} (MESHD_NETLAB names another)")
    if os.geteuid() != 0:
        pytest.skip("netlab needs root")
    spec = importlib.util.spec_from_file_location("netlab", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_lab(netlab: Any) -> Iterator[MakeLab]:
    """Makes labs that last as long as the test: `lab = make_lab(hosts=3)`."""
    with ExitStack() as labs:
        yield lambda **options: labs.enter_context(netlab.Lab(**options))
