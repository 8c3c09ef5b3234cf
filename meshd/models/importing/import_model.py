"""Convert Hugging Face folders and split GGUF files to the one form that meshd runs: a single GGUF file.

An import holds in memory the headers and about a megabyte of one tensor; of a tensor with all experts, it may hold the matrix of
one expert. The same source gives the same bytes, and so the same id, on every device. With a quantisation, matrices become Q8_0
or Q4_1 (`quants.QUANTS`), but the embedding and the head become Q8_0 even with `q4`, since errors show most there; norms, biases
and routers become float32. A matrix whose rows are not whole blocks keeps its type.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from meshd.errors import ModelFileError, StorageError
from meshd.models.cards import END_OF_ANSWER, LEFT_OUT
from meshd.models.files.disk import CHUNK_BYTES, need_space, remove_file
from meshd.models.files.gguf import GgufFile
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.files.gguf_writer import Chunk, GgufWriter, OutTensor
from meshd.models.files.json_files import read_json, shown
from meshd.models.files.safetensors_file import DTYPES, SafetensorsFolder
from meshd.models.importing.huggingface import plan_import
from meshd.models.importing.plan import (
    Array,
    ImportTensor,
    adds_one,
    chunks_of,
    flat_chunks,
    is_mxfp4,
    mxfp4_blocks,
    view_of,
    view_shape,
)
from meshd.models.importing.quantise import BLOCK, quantise
from meshd.models.importing.quants import QUANTS
from meshd.models.importing.source_files import files_of, parts_of
from meshd.models.importing.text_metadata import text_metadata

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type and shape of each tensor of a folder, by name."""
ReadRows = Callable[[str, int, int | None], Array]
_ALWAYS_Q8 = ("token_embd.weight", "output.weight")
_ROUTER = ".ffn_gate_inp.weight"
_DENSE = ("F32", "F16", "BF16")


def import_to(target: Path, path: Path, quant: str | None, begin: Callable[[int], None], advance: Callable[[int], None]) -> str:
    """Convert a folder or a split file to one GGUF file.

    `begin` is called with the size of that file, then `advance` with the size of each chunk that is written.

    Returns: the file's sha256. Raises: ModelFileError, StorageError, and what `advance` raises; then `target` is removed.
    """
    with ExitStack() as opened:
        out = _opened(path, quant, opened)
        need_space(target.parent, out.size)
        begin(out.size)
        whole = False
        try:
            with target.open("wb") as file:
                sha256 = out.write(file, advance)
            whole = True
        except OSError as error:
            why = f"{target} can't be written: {error.strerror or error}"
            raise StorageError(why, hint="free some disk space and pull again; the import starts over") from error
        finally:
            if not whole:
                remove_file(target)
    return sha256


def imported_header(path: Path, quant: str | None) -> GgufFile:
    """Make the header of the file that an import would write, without reading weights. Raises: ModelFileError."""
    with ExitStack() as opened:
        return GgufFile.from_header(_opened(path, quant, opened).header, str(path))


def _opened(path: Path, quant: str | None, opened: ExitStack) -> GgufWriter:
    """Open a folder or a split file for import. The files are closed by `opened`. Raises: ModelFileError."""
    if path.is_dir():
        files_of(path)
        weights = opened.enter_context(SafetensorsFolder.open(path))
        return folder_writer(path, str(path), weights.tensors, quant, weights.read)
    return parts_writer([opened.enter_context(GgufFile.open(part)) for part in parts_of(path)], str(path), quant)


def folder_writer(folder: Path, name: str, known: Tensors, quant: str | None, read: ReadRows) -> GgufWriter:
    """Make the writer of a folder's GGUF file. The folder needs only its small files: `known` describes the weights.

    `name` is for error messages.

    `read` returns rows `[start, stop)` of a tensor; it is called when the file is written. Raises: ModelFileError.
    """
    config = read_json(folder / "config.json")
    try:
        plan = plan_import(config, known)
        tensors = [_converted(tensor, read, known, quant) for tensor in plan.tensors]
    except ModelFileError as error:
        raise ModelFileError(f"{name}: {error.message}", hint=error.hint) from error
    text = text_metadata(folder, config, END_OF_ANSWER)
    left_out: dict[str, MetadataValue] = {LEFT_OUT: len(plan.left_out)} if plan.left_out else {}
    return GgufWriter({**plan.metadata, **left_out, **text, **_version(tensors)}, tensors, name)


def _converted(tensor: ImportTensor, read: ReadRows, known: Tensors, quant: str | None) -> OutTensor:
    """Check that a tensor's sources fit, and describe it for the writer, which reads its values later. Raises: ModelFileError."""
    if not tensor.sources:
        values = np.array(tensor.values, "<f4")
        return OutTensor(tensor.name, "F32", tensor.shape, lambda: [values])
    if is_mxfp4(tensor.transform):
        return _mxfp4_tensor(tensor, read, known)
    dtypes = set()
    for source in tensor.sources:
        if source not in known:
            raise ModelFileError(f"tensor {shown(source)} is missing: {tensor.name} is made from it")
        dtypes.add(known[source][0])
    first = shown(tensor.sources[0])
    if odd := dtypes - set(_DENSE):
        raise ModelFileError(f"tensor {first} can't be used: its type {min(odd)} is not among {', '.join(_DENSE)}")
    sizes = [math.prod(view_shape(known[source][1], tensor.transform)) for source in tensor.sources]
    inner = tensor.shape[1:] if len(sizes) > 1 else tensor.shape
    if (len(sizes) > 1 and tensor.shape[0] != len(sizes)) or any(size != math.prod(inner) for size in sizes):
        shape = known[tensor.sources[0]][1]
        raise ModelFileError(f"tensor {first} can't be used: {shape} does not make {tensor.name} {tensor.shape}")
    given = dtypes.pop() if len(dtypes) == 1 else "F32"
    kind = _kind_for(tensor.name, tensor.shape, "F32" if adds_one(tensor.transform) else given, quant)
    return OutTensor(tensor.name, kind, tensor.shape, partial(_chunks, tensor, read, known, kind))


def _mxfp4_tensor(tensor: ImportTensor, read: ReadRows, known: Tensors) -> OutTensor:
    """Describe an MXFP4 tensor for the writer. Its weights are reordered but not requantised, one expert at a time."""
    if missing := [source for source in tensor.sources if known.get(source, ("", ()))[0] != "U8"]:
        raise ModelFileError(f"tensor {shown(missing[0])} is missing or no U8: {tensor.name} is made from it")
    nibbles, scales = (view_shape(known[source][1], tensor.transform) for source in tensor.sources)
    made = (*nibbles[:-2], nibbles[-2] * 32) if len(nibbles) > 2 else ()
    if nibbles != (*scales, 16) or made != tensor.shape:
        shapes = " and ".join(str(known[source][1]) for source in tensor.sources)
        raise ModelFileError(f"tensor {shown(tensor.sources[0])} can't be used: {shapes} do not make {tensor.name} {tensor.shape}")

    def chunks() -> Iterator[Chunk]:
        try:
            for expert in range(tensor.shape[0]):
                both = (read(source, expert, expert + 1) for source in tensor.sources)
                yield mxfp4_blocks(*(view_of(part, tensor.transform) for part in both))
        except ValueError as error:
            raise ModelFileError(f"tensor {tensor.name} can't be used: {error}", hint="the model is broken") from error

    return OutTensor(tensor.name, "MXFP4", tensor.shape, chunks)


def _kind_for(name: str, shape: tuple[int, ...], given: str, quant: str | None) -> str:
    """Choose the GGUF kind that a dense tensor of kind `given` is written in."""
    if len(shape) < 2 or name.endswith(_ROUTER) or not name.endswith(".weight"):
        return "F32"
    if quant is None or shape[-1] % BLOCK:
        return given
    return QUANTS["q8"] if name in _ALWAYS_Q8 else QUANTS[quant]


def _chunks(tensor: ImportTensor, read: ReadRows, known: Tensors, kind: str) -> Iterator[Chunk]:
    for source in tensor.sources:
        dtype, shape = known[source]
        itemsize = np.dtype(DTYPES[dtype]).itemsize
        for chunk in chunks_of(shape, itemsize, partial(read, source), tensor.transform):
            yield _convert(chunk, dtype, kind, add_one=adds_one(tensor.transform), name=tensor.name)


def _convert(chunk: Array, dtype: str, kind: str, *, add_one: bool, name: str) -> Array:
    """Convert a flat chunk of weights from kind `dtype` to `kind`. Raises: ModelFileError for a weight that is infinite or NaN."""
    same = dtype == kind and not add_one
    if same and dtype == "BF16":
        finite = bool((chunk & 0x7F80 != 0x7F80).all())
        wide = chunk
    else:
        wide = (chunk.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else chunk
        finite = bool(np.isfinite(wide).all())
    if not finite:
        raise ModelFileError(f"tensor {name} can't be used: a weight is no finite number", hint="the model is broken")
    if same:
        return wide
    wide = wide.astype(np.float32, copy=False)
    if add_one:
        wide = wide + np.float32(1)
    if kind == "F32":
        return wide
    try:
        return quantise(wide, kind)
    except ValueError as error:
        raise ModelFileError(f"tensor {name} can't be quantised: {error}") from error


def parts_writer(files: Sequence[GgufFile], path: str, quant: str | None) -> GgufWriter:
    """Make the writer of a split file's whole file: the metadata of the first part, and the tensors of all parts in order.

    Headers without weights will do to make it, but not to write the file. Raises: ModelFileError.
    """
    tensors: list[OutTensor] = []
    metadata: dict[str, MetadataValue] = {}
    total: MetadataValue = None  # type: ignore[assignment]
    for number, file in enumerate(files):
        if len(files) > 1 and (file.metadata.get("split.no"), file.metadata.get("split.count")) != (number, len(files)):
            why = f"its metadata doesn't say that it is part {number + 1} of {len(files)}"
            raise ModelFileError(f"{file.name} can't be used: {why}", hint="fetch all parts of one model, with the names they have")
        if number == 0:
            metadata = {key: value for key, value in file.metadata.items() if not key.startswith("split.")}
            total = file.metadata.get("split.tensors.count", 0)
        for name, info in file.tensors.items():
            kind = _kind_for(name, info.shape, info.kind, quant) if quant and info.kind in _DENSE else info.kind
            tensors.append(OutTensor(name, kind, info.shape, partial(_copied, file, name, kind)))
    if len(files) > 1 and total != len(tensors):
        raise ModelFileError(f"{path} can't be used: its parts have {len(tensors)} tensors, and the first says {total}")
    return GgufWriter({**metadata, **_version(tensors)}, tensors, path)


def _copied(file: GgufFile, name: str, kind: str) -> Iterator[Chunk]:
    tensor = file.tensor(name)
    if tensor.kind != kind:
        values = np.frombuffer(tensor.data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.kind])
        for chunk in flat_chunks(values):
            yield _convert(chunk, tensor.kind, kind, add_one=False, name=name)
    else:
        for start in range(0, len(tensor.data), CHUNK_BYTES):
            yield tensor.data[start : start + CHUNK_BYTES]


def _version(tensors: Sequence[OutTensor]) -> dict[str, MetadataValue]:
    """Return the metadata that a file with quantised tensors must have: the version of GGUF's block layouts."""
    return {"general.quantization_version": 2} if any(tensor.kind not in _DENSE for tensor in tensors) else {}
