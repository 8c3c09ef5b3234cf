"""Recommended sampling parameters are read from both formats, and values that no request could have are left out."""

import pytest

from meshd.models.sampling import sampling_from_gguf, sampling_metadata
from meshd.types import SamplingDefaults

GENERATION = {
    "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05, "do_sample": True, "max_length": 9,
}  # fmt: skip


def test_what_an_importer_keeps_is_read_from_the_file() -> None:
    kept = sampling_metadata(GENERATION)
    assert kept["general.sampling.temp"] == 0.6
    assert set(kept) == {f"general.sampling.{key}" for key in ("temp", "top_p", "top_k", "min_p", "penalty_repeat")}
    expected = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0, repetition_penalty=1.05)
    assert sampling_from_gguf(kept) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 1e300, "0.5", True, None, (0.5,), 10**400])
def test_a_value_that_no_request_could_have_is_left_out(value: object) -> None:
    for key in ("temp", "top_p", "top_k", "min_p", "penalty_repeat"):
        read = sampling_from_gguf({f"general.sampling.{key}": value, "general.sampling.penalty_freq": 0.5})  # type: ignore[dict-item]
        assert read == SamplingDefaults(frequency_penalty=0.5), key


def test_a_file_without_recommendations_has_none() -> None:
    assert sampling_from_gguf({"general.name": "x"}) == SamplingDefaults()
    assert sampling_metadata({}) == {}
