"""What a pull checks of a model before the store records it."""

from pathlib import Path

from meshd.errors import DownloadError
from meshd.models.files.gguf import GgufFile
from meshd.models.store.catalogue import ModelRef, Source
from meshd.models.store.progress import ProgressMeter, in_thread


def check_hash(wanted: ModelRef, source: Source, sha256: str) -> None:
    """Check that the file is the wanted model. Raises: DownloadError."""
    if wanted.sha256 not in (None, sha256):
        raise DownloadError(
            f"{source} is not {wanted.name}: its sha256 is {sha256}, not {wanted.sha256}",
            hint="the source has changed: update meshd",
        )


async def check_file(meter: ProgressMeter, path: Path, name: str) -> None:
    """Check that a GGUF file could answer. Raises: ModelFileError, which names the file as `name`."""
    with GgufFile.open(path) as file:
        file.name = name
        await check_header(meter, file)


async def check_header(meter: ProgressMeter, file: GgufFile) -> None:
    """Check that a model with this header could answer, and report what of it is not used. Raises: ModelFileError."""
    from meshd.models.check import check_model, notes_on

    await in_thread(meter, check_model, file)
    for note in notes_on(file):
        meter.note(note)
