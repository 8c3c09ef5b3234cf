import logging
import subprocess
import sys

import pytest

from meshd.agents.device.descriptors import WANTED, raise_limit, share_descriptors


def raised_in_a_process(soft: int, hard: int, wanted: int = WANTED) -> list[int]:
    """Raise the limit in a process that starts with these limits. Returns: what `raise_limit` returned, and the limit then."""
    script = (
        "import resource; from meshd.agents.device import descriptors\n"
        f"descriptors.WANTED = {wanted}\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "print(descriptors.raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    assert raised_in_a_process(256, 1000) == [1000, 1000]
    assert raised_in_a_process(256, 256) == [256, 256]


def test_a_limit_that_is_high_enough_stays() -> None:
    assert raised_in_a_process(300, 1000, wanted=200) == [300, 300]


@pytest.mark.parametrize("limit", [180, 200, 256, 512, 1024, 4096, 65536])
def test_all_connections_together_leave_descriptors_for_files(limit: int) -> None:
    shares = share_descriptors(limit)
    assert shares.clients + 2 * shares.links + shares.half_open <= limit - 96
    assert shares.clients >= 16
    assert shares.links >= 4


def test_with_the_usual_limits_nothing_is_short() -> None:
    assert share_descriptors(raise_limit()).links == share_descriptors(4096).links == 256


def test_a_limit_that_is_too_low_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        shares = share_descriptors(64)
    assert "raise the limit" in caplog.text
    assert (shares.clients, shares.links) == (16, 4)
