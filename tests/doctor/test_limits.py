"""Limits of this process that `meshd doctor` looks at. `test_broken_setups.py` has those of memory and of control groups."""

import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from meshd.agents.cluster_service import CheckResult
from meshd.doctor.check import Context


@pytest.mark.parametrize(("files", "status"), [(100, "wrong"), (300, "warning"), (4096, "ok")])
def test_too_few_descriptors_are_named(files: int, status: str) -> None:
    """In a process of its own, whose limit is really so low."""
    code = (
        f"import resource, json, msgspec; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}));"
        "from types import SimpleNamespace; from meshd.doctor.limits import open_files;"
        "print(msgspec.json.encode(list(open_files(SimpleNamespace(peer=None)))).decode())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert f'"status":"{status}"' in done.stdout
    assert ("ulimit -n 65536" in done.stdout) == (status != "ok")


def test_the_limit_of_this_process_is_left_alone(context: Context, diagnose: Callable[[Context], list[CheckResult]]) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    diagnose(context)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
