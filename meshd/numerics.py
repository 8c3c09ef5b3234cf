"""Numerics ids: names of ways to compute that are made from what a device gives.

`onnxruntime/int8/512/3f9c0a1b2c3d4e5f` is the backend, the precision of its activations, the positions in a span of attention, and
a hash of what a fixed set of inputs gives on the device (`kernels/numerics/`). Devices with equal ids compute equal bits.

An id that ends in `/varies` makes no promise: there, a token's bits depend on how many others are computed beside it. So a
recovery, or another request at the same time, may decide a near-tie otherwise even on one device.
"""

from collections.abc import Iterable
from typing import Annotated, NewType

from msgspec import Meta

_ID = r"\A([a-z0-9-]{1,32}/[a-z0-9]{1,8}/[0-9]{1,8}/[0-9a-f]{16}(/varies)?)?\Z"
NumericsId = NewType("NumericsId", Annotated[str, Meta(title="NumericsId", pattern=_ID)])
"""Empty: not measured."""
UNKNOWN = NumericsId("")
VARIES = "/varies"
DIGITS = 16
"""Hexadecimal digits of the hash."""


def numerics_id(backend: str, precision: str, span_tokens: int, digest: str, *, batch_invariant: bool) -> NumericsId:
    """Make an id. `digest` is in hexadecimal; its first `DIGITS` digits are used."""
    return NumericsId(f"{backend}/{precision}/{span_tokens}/{digest[:DIGITS]}{'' if batch_invariant else VARIES}")


def is_promised(numerics: NumericsId) -> bool:
    """Whether a token's bits do not depend on what is computed beside it."""
    return bool(numerics) and not numerics.endswith(VARIES)


def show_numerics(numerics: Iterable[NumericsId]) -> str:
    """Join the different ids in the order in which they come first. Empty if none is known."""
    return ", ".join(dict.fromkeys(one for one in numerics if one))
