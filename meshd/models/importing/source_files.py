"""Find the files of a model that is not a single GGUF file: a split file, or a folder of safetensors."""

import re
from collections.abc import Mapping
from pathlib import Path

from meshd.errors import ModelFileError
from meshd.models.files.json_files import read_json, shown, string_map
from meshd.models.importing.text_metadata import TEXT_FILES

INDEX = "model.safetensors.index.json"
MAX_PARTS = 1024
_SHARD = re.compile(r"[\w+ -][\w.+ -]{0,200}\.safetensors", re.ASCII)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def needs_import(path: Path, quant: str | None) -> bool:
    """Whether a model must be imported. A single GGUF file is used in place unless it is to be quantised."""
    return quant is not None or path.is_dir() or _PART.fullmatch(path.name) is not None


def files_of(path: Path) -> list[Path]:
    """List every file that an import of `path` reads. Raises: ModelFileError if one is missing."""
    if not path.is_dir():
        return parts_of(path)
    if not (path / "config.json").is_file():
        hint = "name a .gguf file, or a folder with config.json and *.safetensors"
        raise ModelFileError(f"{path} can't be used: it has no config.json", hint=hint)
    beside = [path / name for name in ("config.json", *TEXT_FILES, INDEX) if (path / name).is_file()]
    return [*beside, *weight_files(path)[0]]


def parts_of(path: Path) -> list[Path]:
    """List all parts of the split file that `path` is a part of, in order; only `path` if it is not split.

    Raises: ModelFileError if one is missing.
    """
    match = _PART.fullmatch(path.name)
    names = split_names(path.name) if match else [path.name]
    paths = [path.with_name(name) for name in names]
    for part in paths:
        if not part.is_file():
            why = "this part of the model is missing" if match else "there is no such file"
            raise ModelFileError(f"{part} can't be used: {why}", hint="name a .gguf file that exists, with all its parts beside it")
    return paths


def split_names(name: str) -> list[str]:
    """List the names of all parts of a split file: `NAME-00001-of-00003.gguf` has three. Any other name is returned alone.

    Raises: ModelFileError if the name has an impossible part number.
    """
    match = _PART.fullmatch(name)
    if not match:
        return [name]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= MAX_PARTS:
        raise ModelFileError(f"{name} can't be used: its name says part {match[2]} of {match[3]} (at most {MAX_PARTS})")
    return [f"{match[1]}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]


def weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """List a folder's safetensors files.

    Returns: the files, and the index's map from tensors to file names (empty without an index). Raises: ModelFileError.
    """
    index = folder / INDEX
    if index.is_file():
        where = string_map(read_json(index).get("weight_map"))
        if not where:
            raise ModelFileError(f"{index} can't be used: its weight_map is no object of file names")
        shards = sorted(set(where.values()))
        for shard in shards:
            if not _SHARD.fullmatch(shard):
                raise ModelFileError(f"{index} can't be used: {shown(shard)} is no name of a safetensors file beside it")
            if not (folder / shard).is_file():
                raise ModelFileError(f"{folder / shard} is missing: {INDEX} names it", hint="fetch the folder again")
        return [folder / shard for shard in shards], where
    found = sorted(folder.glob("*.safetensors"))
    usual = folder / "model.safetensors"
    if usual in found:
        return [usual], {}
    if len(found) == 1:
        return found, {}
    if found:
        raise ModelFileError(f"{folder} can't be used: it has {len(found)} safetensors files and no {INDEX}")
    pickles = next(iter(sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))), None)
    hint = f"{pickles.name} is a pickle, which can run code: save the model as safetensors" if pickles else "fetch the folder again"
    raise ModelFileError(f"{folder} can't be used: it has no safetensors file", hint=hint)
