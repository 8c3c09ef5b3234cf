"""The names that `--quant` takes."""

import numpy as np
import pytest

from meshd.models.files.gguf_header import KINDS
from meshd.models.importing.quantise import BLOCK, quantise
from meshd.models.importing.quants import QUANTS


@pytest.mark.parametrize("quant", QUANTS)
def test_every_name_is_a_gguf_kind_that_weights_can_become(quant: str) -> None:
    sizes = {name: block_bytes for name, _, block_bytes in KINDS.values()}
    blocks = quantise(np.linspace(-1, 1, 2 * BLOCK, dtype=np.float32), QUANTS[quant])
    assert blocks.nbytes == 2 * sizes[QUANTS[quant]]
