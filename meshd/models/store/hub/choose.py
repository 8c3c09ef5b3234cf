"""Chooses the files of a repository that make up a model. Pure."""

import re
from collections.abc import Iterable, Sequence

from meshd.errors import DownloadError
from meshd.models.importing.source_files import INDEX, split_names
from meshd.models.importing.text_metadata import TEXT_FILES
from meshd.models.store.catalogue import HubSource

USUAL_QUANT = "Q4_K_M"
_BESIDE = re.compile(r"(?:^|[/._-])(?:mmproj|imatrix|mtp)(?:[/._-]|$)", re.IGNORECASE)
"""Names of GGUF files that are published beside a model, and are none."""
_QUANT = re.compile(
    r"(?:^|[/._-])((?:UD-)?(?:I?Q[1-8]_[A-Z0-9]+(?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|F16|FP16|F32))(?=[/._-]|$)",
    re.IGNORECASE,
)
_LISTED = 12
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def choose_files(source: HubSource, files: Iterable[str]) -> list[str]:
    """Choose the files to fetch among a repository's. For a model of safetensors, config.json comes first.

    Raises: DownloadError, which lists the choices, if the reference fits no model or several.
    """
    files = list(files)
    models = sorted({all_parts(file)[0] for file in files if file.endswith(".gguf") and not _BESIDE.search(file)})
    safetensors = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    if "config.json" in files and safetensors and not source.tag and (not models or source.quant):
        return ["config.json", *sorted({INDEX, *TEXT_FILES} & set(files)), *_weights(safetensors)]
    if not models:
        raise _no_model(source, files)
    return all_parts(_model_of(source, models))


def all_parts(file: str) -> list[str]:
    """List all parts of a split file, or just the file if it isn't split."""
    folder, slash, name = file.rpartition("/")
    return [folder + slash + part for part in split_names(name)]


def _model_of(source: HubSource, models: Sequence[str]) -> str:
    """Choose one GGUF file: that of the quantisation that the reference names, else the only one, else the usual quantisation."""
    if len(models) == 1 and not source.tag:
        return models[0]
    wanted = source.tag or USUAL_QUANT
    fitting = [model for model in models if wanted.upper() in _quants(model)]
    if len(fitting) == 1:
        return fitting[0]
    choices = fitting or models
    listed = ", ".join(choices[:_LISTED]) + (", ..." if len(choices) > _LISTED else "")
    if fitting:
        problem = f"{source.repository} has several files in {wanted}: {listed}"
    elif source.tag:
        problem = f"{source.repository} has no GGUF file in {wanted}; its files are {listed}"
    else:
        problem = f"{source.repository} has {len(models)} GGUF files, none or several of them in {USUAL_QUANT}: {listed}"
    plain = f"hf:{source.repository}" + (f"@{source.revision}" if source.revision else "")
    quants = sorted({quant for model in choices for quant in _quants(model)})
    example = f"{plain}:{quants[0]}" if quants and not fitting else f"{plain}:{choices[0]}"
    raise DownloadError(f"{source} names no single file: {problem}", hint=f"name one, as in {example}")


def _quants(model: str) -> set[str]:
    """Return the quantisations in a file's path, in upper case."""
    return {match[1].upper() for match in _QUANT.finditer(model.removesuffix(".gguf"))}


def _no_model(source: HubSource, files: Sequence[str]) -> DownloadError:
    pickles = [file for file in files if file.endswith(_PICKLES)]
    beside = [file for file in files if file.endswith(".gguf")]
    if pickles:
        why = f"it has only {', '.join(pickles[:3])}, which is a pickle and can run code"
        hint = "take a repository with safetensors or GGUF files"
    elif beside:
        why, hint = f"its GGUF files are no models ({', '.join(beside[:3])})", "take the repository of the model itself"
    elif source.tag and "config.json" in files:
        why, hint = (
            f"it has no GGUF file in {source.tag}, only safetensors",
            f"write hf:{source.repository}, with --quant to make it small",
        )
    elif any(file.endswith(".safetensors") for file in files):
        why, hint = (
            "its safetensors have no config.json beside them",
            "take a repository in the layout of transformers, or a GGUF file",
        )
    else:
        why, hint = "it has no GGUF and no safetensors file", "take a repository that has one"
    return DownloadError(f"{source} is no model that can be run: {why}", hint=hint)


def _weights(files: list[str]) -> list[str]:
    """Choose the files with the usual names, if any: some repositories have the same weights in a file of another name too."""
    usual = [file for file in files if file == "model.safetensors" or file.startswith("model-")]
    return usual or files
