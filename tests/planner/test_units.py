import pytest

from meshd.planner.units import show_bytes, show_rate, show_seconds, show_value
from meshd.types import Objective


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB")]
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert show_bytes(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0 us"), (12e-6, "12 us"), (0.0123, "12.3 ms"), (2.5, "2.5 s")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (Objective.LATENCY, "TPOT 250 ms (4 tok/s)"),
        (Objective.TTFT, "TTFT 250 ms"),
        (Objective.THROUGHPUT, "4 tok/s over many requests"),
        (Objective.ENERGY, "0.25 J per token"),
        (Objective.MEMORY, "25% of the fullest peer's memory"),
    ],
)
def test_each_objective_has_its_unit(objective: Objective, text: str) -> None:
    assert show_value(objective, 0.25) == text


def test_rates_have_three_digits() -> None:
    assert show_rate(0.0123) == "81.3 tok/s"
