"""Models from Hugging Face, through its own library: they lie in the standard cache, shared with the user's other tools."""

from pathlib import Path
from typing import Any

from meshd.errors import DownloadError, MeshdError
from meshd.models.catalogue import HubSource
from meshd.models.files import need_space, storage_error
from meshd.models.progress import Meter, PullPhase


def fetch_from_hub(source: HubSource, *, cache: Path | None, endpoint: str | None, meter: Meter) -> Path:
    """The file in the cache, fetched if it is not there; a download that stopped goes on. `cache` None is the standard one.

    Blocks: run it in a thread. Raises: DownloadError, StorageError, Cancelled.
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
    except Exception as error:  # the library lets through the errors of whatever HTTP client it is built on
        raise _failed(source, error) from error


def _fetch(source: HubSource, cache: Path | None, endpoint: str | None, meter: Meter) -> Path:
    from huggingface_hub import hf_hub_download

    where: dict[str, Any] = {"revision": source.revision, "cache_dir": cache, "endpoint": endpoint}
    file = source.file or _only_model(source, endpoint)
    planned = hf_hub_download(source.repository, file, dry_run=True, **where)
    if planned.will_download:
        folder = Path(planned.local_path)
        need_space(next(parent for parent in folder.parents if parent.exists()), planned.file_size or 0)
        meter.begin(PullPhase.DOWNLOADING, total=planned.file_size)
    return Path(hf_hub_download(source.repository, file, tqdm_class=_bar(meter), **where))


def _only_model(source: HubSource, endpoint: str | None) -> str:
    from huggingface_hub import HfApi

    files = HfApi(endpoint=endpoint).list_repo_files(source.repository, revision=source.revision)
    models = sorted(file for file in files if file.endswith(".gguf"))
    if len(models) != 1:
        listed = ", ".join(models[:12]) or "none"
        raise DownloadError(f"{source} names no file: the repository's GGUF files are {listed}", hint=f"write {source}:FILE.gguf")
    return models[0]


def _bar(meter: Meter) -> type[Any]:
    """A progress bar, as the library wants one, that draws nothing and tells the meter."""
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
