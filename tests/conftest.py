"""Set-up of all tests: signals, hypothesis, and the order of tests with real daemons."""

import signal
from pathlib import Path

import hypothesis
import pytest

pytest.register_assert_rewrite("real_daemons", "fake_api")

# Under nohup or in a shell's background job, these signals are ignored, and processes that tests start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("untimed", deadline=None)  # on a busy machine any example may be slow
hypothesis.settings.load_profile("untimed")

ONE_AFTER_ANOTHER = {"cluster": "daemons", "chaos": "hosts", "netlab": "hosts"}
"""Folder -> group of tests that must not run at the same time, since they start real daemons (`pytest -n 2 --dist loadgroup`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that start real daemons first, since they take longest."""
    folder = Path(__file__).parent
    for item in items:
        group = ONE_AFTER_ANOTHER.get(item.path.relative_to(folder).parts[0])
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
