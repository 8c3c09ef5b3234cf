"""The sampling parameters that a model's authors recommend, from a GGUF file's metadata or from generation_config.json."""

from collections.abc import Mapping
from typing import Any

import msgspec

from meshd.models.files.gguf_header import MetadataValue
from meshd.types import SamplingDefaults

GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
    "presence_penalty": "general.sampling.penalty_present",
    "frequency_penalty": "general.sampling.penalty_freq",
}
"""Parameter -> llama.cpp's key. generation_config.json has the parameters under their own names."""
_WHOLE = frozenset({"top_k"})


def sampling_from_gguf(metadata: Mapping[str, MetadataValue]) -> SamplingDefaults:
    """Read the recommended parameters of a GGUF file. A value that no request could have is left out."""
    return SamplingDefaults(**_valid({name: metadata[key] for name, key in GGUF_KEYS.items() if key in metadata}))


def sampling_metadata(generation_config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Convert the recommended parameters of generation_config.json to a GGUF file's metadata. `do_sample` is not read:

    most authors leave it out, which means greedy to transformers, although they recommend a temperature.
    """
    return {GGUF_KEYS[name]: value for name, value in _valid({n: generation_config.get(n) for n in GGUF_KEYS}).items()}


def _valid(values: Mapping[str, object]) -> dict[str, Any]:
    return {name: number for name, value in values.items() if (number := _number(name, value)) is not None}


def _number(name: str, value: object) -> float | int | None:
    """Return a value as the number that its parameter takes; None if it is no such number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number: float | int = int(value) if name in _WHOLE else float(value)
        msgspec.convert({name: number}, SamplingDefaults)
    except (ValueError, OverflowError):  # also a msgspec.ValidationError
        return None
    return number
