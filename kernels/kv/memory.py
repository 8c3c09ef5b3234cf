"""What a layer remembers of a session: one of five kinds, derived from the model's spec and not from its weights.

full        K and V of every token
windowed    K and V of the tokens in the layer's window; older ones are given back
latent      one row per token, from which K and V are computed (MLA)
recurrent   a state at a page border, the rows since then, and some rows before it for a convolution
shared      nothing of its own: the layer reads the memory of another layer
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from meshd.types import LayerRange, ModelId, ModelSpec

PAGE_TOKENS = 32
"""Tokens in a page. Attention reads whole pages; a size that is not a multiple of `KEY_STEP` would change the last bits."""
REWIND_TOKENS = 3 * PAGE_TOKENS
"""Tokens that are kept behind a window, so that a new epoch can resume before the committed position: while tokens are decoded, a
mirror lacks less than a page, and two chunks in flight of a page each. Of a prompt it may lack more; then all is computed again."""


class MemoryKind(IntEnum):
    """The kind of a layer's memory. The numbers are those on the wire (SPEC.md, section 10)."""

    FULL = 1
    WINDOWED = 2
    LATENT = 3
    RECURRENT = 4
    SHARED = 5


class Precision(Enum):
    """How rows are stored. It does not change while a lease is open. States are always float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    @property
    def value_bytes(self) -> int:
        """Bytes of one stored number."""
        return _VALUE_BYTES[self]


_VALUE_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.INT8: 1}


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one layer remembers. Use the functions below to make one."""

    kind: MemoryKind
    rows: tuple[tuple[int, ...], ...] = ()
    """Shapes of the arrays that are stored for each token, e.g. K and V, each `(kv_heads, head_dim)`."""
    window: int = 0
    """Number of tokens before the next one that are still read. 0: all."""
    state: tuple[int, ...] = ()
    """Shape of the recurrent state."""
    history: int = 0
    """Number of rows before a page border that are read together with the state at this border."""
    layer: int = -1
    """The layer whose memory a shared layer reads."""
    row_values: int = field(init=False, compare=False, repr=False)
    """Numbers stored for each token."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_values", sum(math.prod(shape) for shape in self.rows))

    @property
    def state_bytes(self) -> int:
        """Bytes of one recurrent state."""
        return 4 * math.prod(self.state) if self.state else 0

    @property
    def kept_tokens(self) -> int:
        """Tokens whose rows are kept behind the committed position. 0: all."""
        if self.kind is MemoryKind.RECURRENT:
            return PAGE_TOKENS + self.history
        return self.window + REWIND_TOKENS if self.window else 0


def full(kv_heads: int, key_width: int, value_width: int) -> LayerMemory:
    return LayerMemory(MemoryKind.FULL, ((kv_heads, key_width), (kv_heads, value_width)))


def windowed(window: int, kv_heads: int, key_width: int, value_width: int) -> LayerMemory:
    return LayerMemory(MemoryKind.WINDOWED, ((kv_heads, key_width), (kv_heads, value_width)), window=window)


def latent(width: int) -> LayerMemory:
    return LayerMemory(MemoryKind.LATENT, ((width,),))


def recurrent(state: tuple[int, ...], row_width: int, history: int) -> LayerMemory:
    """`history`: rows before the state's border that the layer's convolution reads."""
    return LayerMemory(MemoryKind.RECURRENT, ((row_width,),), state=state, history=history)


def shared(layer: int) -> LayerMemory:
    return LayerMemory(MemoryKind.SHARED, layer=layer)


@dataclass(frozen=True, slots=True)
class KvKey:
    """What a lease holds. A lease serves whoever has this key; it does not depend on weights that a peer has loaded."""

    model: ModelId
    layers: LayerRange
    kv_heads: tuple[int, int] | None = None
    """`[first, last)`. None: all KV heads."""


Layout = tuple[LayerMemory, ...]
"""The memory of each layer of a key, in order."""


def layout_of(spec: ModelSpec, layers: LayerRange, kv_heads: tuple[int, int] | None = None) -> Layout:
    """Return what the layers remember, of all KV heads or of `[first, last)`."""
    first, last = kv_heads or (0, spec.kv_heads)
    return tuple(_memory_of(spec, layer, last - first) for layer in layers)


def _memory_of(spec: ModelSpec, layer: int, kv_heads: int) -> LayerMemory:
    if spec.window and (not spec.windowed or spec.windowed[layer]):
        return windowed(spec.window, kv_heads, spec.head_dim, spec.head_dim)
    return full(kv_heads, spec.head_dim, spec.head_dim)


def pages(tokens: int) -> int:
    """Number of pages that `tokens` tokens begin."""
    return -(-tokens // PAGE_TOKENS)


def reserved_pages(memory: LayerMemory, capacity: int, step_tokens: int) -> int:
    """Number of pages of a layer that a lease for `capacity` tokens reserves, with `step_tokens` beyond the committed position."""
    if memory.kind is MemoryKind.SHARED:
        return 0
    if not memory.kept_tokens:
        return pages(capacity)
    # One page more, because what is kept need not begin at a page border.
    return min(pages(capacity), pages(memory.kept_tokens + step_tokens) + 1)


STATES = 2
"""States of a recurrent layer: at the last border that is committed, and at the last one that is computed."""


def reserved_bytes(layout: Layout | Counter[LayerMemory], precision: Precision, capacity: int, step_tokens: int) -> int:
    """Bytes that a lease for `capacity` tokens reserves. `layout`: the layers, or how many layers there are of each kind."""
    rows = states = 0
    for memory, layers in (layout if isinstance(layout, Counter) else Counter(layout)).items():
        rows += layers * reserved_pages(memory, capacity, step_tokens) * memory.row_values
        states += layers * STATES * memory.state_bytes
    return rows * PAGE_TOKENS * precision.value_bytes + states
