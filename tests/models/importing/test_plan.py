"""The transforms of an import plan, as views of an array and by blocks of rows."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from meshd.errors import ModelFileError
from meshd.models.importing.plan import TENSOR_CHUNK_BYTES, chunks_of, flat_chunks, mxfp4_blocks, view_of, view_shape


@pytest.mark.parametrize(
    ("transform", "change"),
    [
        ("", lambda w: w),
        ("add_one", lambda w: w),
        ("transpose", lambda w: w.swapaxes(-2, -1)),
        ("slice:0::4:", lambda w: w[:4]),
        ("slice:0:4::|transpose", lambda w: w[4:].swapaxes(-2, -1)),
        ("slice:1:1::2", lambda w: w[:, 1::2]),
        ("slice:-1:0:3:", lambda w: w[..., 0:3]),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_transforms_are_views(transform: str, change: Callable[[np.ndarray], np.ndarray], dtype: type) -> None:
    array = np.arange(8 * 6 * 4).astype(dtype).reshape(8, 6, 4)
    view = view_of(array, transform)
    assert np.shares_memory(view, array)
    np.testing.assert_array_equal(np.concatenate(list(flat_chunks(view))), change(array).reshape(-1))


@pytest.mark.parametrize("transform", ["slice:0:1", "rope_interleave:0", "rope_interleave:5", "slice:0:x::", "odd", "transpose:1"])
def test_a_transform_that_does_not_fit_is_an_error(transform: str) -> None:
    with pytest.raises(ModelFileError, match="does not fit shape"):
        view_of(np.zeros((8, 6), np.float32), transform)


def test_chunks_are_small_and_in_order() -> None:
    array = np.arange(3 << 20, dtype=np.uint32).reshape(3, 1 << 10, 1 << 10)
    for view in (array, array.swapaxes(1, 2), array.swapaxes(0, 1)):
        parts = list(flat_chunks(view))
        assert max(part.nbytes for part in parts) <= TENSOR_CHUNK_BYTES
        np.testing.assert_array_equal(np.concatenate(parts), view.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "transform"),
    [
        ((), ""),
        ((0, 4), ""),
        ((5,), "add_one"),
        ((700, 1024), ""),
        ((3, 600, 512), "transpose"),
        ((3, 600, 512), "transpose|slice:1:0::2"),
        ((600, 512), "transpose"),
        ((2048, 1024), "rope_interleave:8"),
        ((4096, 256), "rope_interleave:2"),
        ((48, 20), "rope_interleave:4|slice:0:2::"),
        ((700, 1024), "slice:0:3::2"),
        ((700, 1024), "slice:-1:5:9:"),
    ],
)
def test_a_source_read_in_blocks_gives_the_same_values_as_the_whole_array(shape: tuple[int, ...], transform: str) -> None:
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    read: list[int] = []

    def rows(start: int, stop: int) -> np.ndarray:
        block = array[start:stop] if array.ndim else array
        read.append(block.nbytes)
        return block

    whole = view_of(array, transform)
    assert view_shape(shape, transform) == whole.shape
    np.testing.assert_array_equal(np.concatenate(list(chunks_of(shape, 4, rows, transform))), whole.reshape(-1))
    assert sum(read) == array.nbytes


def test_a_block_is_a_megabyte_of_rows_that_the_transform_keeps_together() -> None:
    read: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return np.zeros((stop - start, 1024), np.float32)

    list(chunks_of((1024, 1024), 4, rows, ""))
    assert read == [(0, 256), (256, 512), (512, 768), (768, 1024)]
    read.clear()
    list(chunks_of((1200, 1024), 4, rows, "rope_interleave:12"))  # heads of 100 rows: a block takes two heads
    assert read == [(start, start + 200) for start in range(0, 1200, 200)]


def test_mxfp4_blocks_are_a_scale_then_low_and_high_halves() -> None:
    nibbles = np.arange(16, dtype=np.uint8).reshape(1, 16) * 16 + 1
    block = mxfp4_blocks(nibbles, np.array([7], np.uint8))
    assert block[0] == 7
    # Hugging Face: byte i has weights 2i (low half) and 2i + 1 (high half). ggml: byte j has weights j (low) and j + 16 (high).
    weights = np.stack([nibbles[0] & 15, nibbles[0] >> 4], axis=1).reshape(-1)
    np.testing.assert_array_equal(block[1:] & 15, weights[:16])
    np.testing.assert_array_equal(block[1:] >> 4, weights[16:])
    with pytest.raises(ValueError, match="no number"):
        mxfp4_blocks(nibbles, np.array([255], np.uint8))
