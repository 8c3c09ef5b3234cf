"""Shared by all tests."""

import signal
from pathlib import Path

import hypothesis
import pytest

pytest.register_assert_rewrite("real_daemons", "fake_api")

# Run by nohup or as a shell's background job, these are ignored, which the processes that tests start would inherit and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes says nothing on a busy machine
hypothesis.settings.load_profile("untimed")

ONE_AFTER_ANOTHER = {"cluster": "daemons", "chaos": "hosts", "netlab": "hosts"}
"""Folders whose tests run real daemons: two of them at once on two cores are enough (`pytest -n 2 --dist loadgroup`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, each kind in a row."""
    folder = Path(__file__).parent
    for item in items:
        group = ONE_AFTER_ANOTHER.get(item.path.relative_to(folder).parts[0])
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
