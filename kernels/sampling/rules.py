"""Which sampling parameters a model can use. Checked where a request arrives, and again by the stage that samples."""

import msgspec

from meshd.errors import InvalidSampling
from meshd.types import SamplingParams

_FACTOR = 1e3
"""A repetition penalty divides and multiplies logits by at most this much: far more would leave the range of float32."""


def check_sampling(params: SamplingParams, vocab: int) -> None:
    """Check the parameters for a model with `vocab` tokens. Raises: InvalidSampling, which names the parameter."""
    for name in params.__struct_fields__:
        given = {name: getattr(params, name)}
        try:
            msgspec.convert(given, SamplingParams)  # the bounds that hold for a message: a peer would refuse the whole message
        except msgspec.ValidationError as error:
            raise _invalid(name, str(error)) from error
    if not 1 / _FACTOR <= params.repetition_penalty <= _FACTOR:
        raise _invalid("repetition_penalty", f"{params.repetition_penalty:g} is not from {1 / _FACTOR:g} to {_FACTOR:g}")
    outside = [token for token in params.logit_bias if token >= vocab]
    if outside:
        raise _invalid("logit_bias", f"token {outside[0]} is outside the vocabulary, whose ids go from 0 to {vocab - 1}")


def _invalid(name: str, why: str) -> InvalidSampling:
    return InvalidSampling(f"{name} can't be used: {why}", param=name)
