"""Fetch models from Hugging Face with its own library, into the standard cache that other tools use too."""

from pathlib import Path
from typing import Any

from meshd.errors import DownloadError, MeshdError
from meshd.models.files.disk import need_space, storage_error
from meshd.models.importing.source_files import INDEX, split_names
from meshd.models.importing.text_metadata import TEXT_FILES
from meshd.models.store.catalogue import HubSource
from meshd.models.store.progress import ProgressMeter, PullPhase


def fetch_from_hub(source: HubSource, *, cache: Path | None, endpoint: str | None, meter: ProgressMeter) -> Path:
    """Fetch a model into the cache, unless the cache has it. A stopped download resumes. Blocks.

    `cache` None: the standard cache.

    Returns: the path of the model in the cache: its file, the first part of a split file, or its folder of safetensors.
    Raises: DownloadError, StorageError, Cancelled.
    """
    meter.begin(PullPhase.FINDING, source=source)
    try:
        return _fetch(source, cache, endpoint, meter)
    except MeshdError:
        raise
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise storage_error(Path(str(error.filename)), error) from error
        raise _failed(source, error) from error
    except Exception as error:  # the library does not wrap the errors of its HTTP client, which differs between its versions
        raise _failed(source, error) from error


def _fetch(source: HubSource, cache: Path | None, endpoint: str | None, meter: ProgressMeter) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    options: dict[str, Any] = {"revision": source.revision, "cache_dir": cache, "endpoint": endpoint}
    files = _wanted(source, endpoint)
    planned = []
    for file in files:
        try:
            planned.append(hf_hub_download(source.repository, file, dry_run=True, **options))
        except EntryNotFoundError as error:
            raise DownloadError(f"{source} can't be fetched: {source.repository} has no file {file}") from error
    downloads = [plan for plan in planned if plan.will_download]
    if downloads:
        total = sum(plan.file_size or 0 for plan in downloads)
        folder = Path(downloads[0].local_path)
        need_space(next(parent for parent in folder.parents if parent.exists()), total)
        meter.begin(PullPhase.DOWNLOADING, total=total)
    bar = _bar(meter)
    paths = []
    for file, plan in zip(files, planned, strict=True):
        paths.append(Path(hf_hub_download(source.repository, file, tqdm_class=bar, **options)))
        if plan.will_download:
            meter.settle(plan.file_size or 0)
    if len({path.parent for path in paths}) > 1:
        raise DownloadError(f"{source} was changed while it was fetched: its files are of several versions", hint="pull it again")
    return paths[0] if files[0].endswith(".gguf") else paths[0].parent


def _wanted(source: HubSource, endpoint: str | None) -> list[str]:
    """List the files to fetch. For a model of safetensors, config.json comes first."""
    from huggingface_hub import HfApi

    if source.file:
        return _all_parts(source.file)
    files = HfApi(endpoint=endpoint).list_repo_files(source.repository, revision=source.revision)
    models = sorted({_all_parts(file)[0] for file in files if file.endswith(".gguf")})
    safetensors = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    if "config.json" in files and safetensors and (not models or source.quant):
        return ["config.json", *sorted({INDEX, *TEXT_FILES} & set(files)), *_weights(safetensors)]
    if len(models) != 1:
        listed = ", ".join(models[:12]) or "none"
        raise DownloadError(f"{source} names no file: the repository's GGUF files are {listed}", hint=f"write {source}:FILE.gguf")
    return _all_parts(models[0])


def _all_parts(file: str) -> list[str]:
    """List all parts of a split file, or just the file if it isn't split."""
    folder, slash, name = file.rpartition("/")
    return [folder + slash + part for part in split_names(name)]


def _weights(files: list[str]) -> list[str]:
    """Choose the files with the usual names, if any: some repositories have the same weights in a file of another name too."""
    usual = [file for file in files if file == "model.safetensors" or file.startswith("model-")]
    return usual or files


def _bar(meter: ProgressMeter) -> type[Any]:
    """Make a progress bar class for the library. It draws nothing and reports to the meter."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]
            meter.restart(int(kwargs.get("initial", 0)))

        def update(self, n: float | None = 1) -> None:
            meter.advance(int(n or 0))

    return Bar


def _failed(source: HubSource, error: Exception) -> DownloadError:
    lines = str(error).strip().splitlines()
    return DownloadError(
        f"{source} can't be fetched: {lines[0] if lines else type(error).__name__}", hint="is the network up, and the name right?"
    )
