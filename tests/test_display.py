"""Sizes, rates and times for people."""

import pytest

from meshd.display import duration, flops, layers, plural, rate, short_id, size


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (98_362_432, "93.8 MiB"), (2**50, "1024 TiB")]
)
def test_sizes_are_binary(count: int | None, text: str) -> None:
    assert size(count) == text


def test_rates_are_decimal() -> None:
    assert rate(8.29e9) == "8.3 GB/s"
    assert rate(117_600_000) == "118 MB/s"
    assert rate(None) == rate(0) == "-"
    assert flops(1.069e11) == "107 GFLOP/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.0, "0 us"), (8.5e-5, "85 us"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (4.2, "4.2 s"),
        (119.0, "119 s"), (150.0, "2 min"), (7200.0, "2 h"), (200_000.0, "2 d"),
    ],
)  # fmt: skip
def test_durations_have_a_suitable_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_ids_counts_and_layers() -> None:
    assert short_id("k3j2x9d1" + "a" * 44) == "k3j2x9d1"
    assert [plural(count, "peer") for count in (0, 1, 2)] == ["0 peers", "1 peer", "2 peers"]
    assert layers([0, 12]) == layers("0-12") == "0-12"
