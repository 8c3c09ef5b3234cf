"""The standard cache of Hugging Face's library, which other tools read and write too.

    models--ORG--NAME/refs/<revision>             the commit that a branch or tag was last seen at
    models--ORG--NAME/blobs/<etag>                a file's content
    models--ORG--NAME/snapshots/<commit>/<path>   a link to it

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. The library's own download function is not used: it can't
be stopped within a second, and from version 2 on it deletes what a stopped download has received.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from meshd.errors import DownloadError
from meshd.models.files.disk import replace_durably, storage_error

DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at one commit."""

    name: str
    url: str
    commit: str
    etag: str
    """Names the content; for large files it is their sha256."""
    size: int | None


class HubCache:
    """The cached files of one repository."""

    def __init__(self, root: Path | None, repository: str) -> None:
        """`root` None: the folder that Hugging Face's library uses."""
        if root is None:
            from huggingface_hub.constants import HF_HUB_CACHE

            root = Path(HF_HUB_CACHE)
        self.root = root
        self._folder = root / f"models--{repository.replace('/', '--')}"

    def find(self, file: RemoteFile) -> Path | None:
        """Return the path of a file's snapshot, which is linked first if the cache has only its content. Raises: StorageError."""
        path = self._snapshot(file.commit, file.name)
        if path.is_file():
            return path
        blob = self._blob(file)
        if not blob.is_file():
            return None
        try:
            return self._link(blob, path)
        except OSError as error:
            raise storage_error(path, error) from error

    def find_offline(self, revision: str | None, names: list[str]) -> list[Path]:
        """Return the snapshots of the named files at the commit where the revision was last seen; empty if one is missing."""
        commit = self._commit_of(revision or DEFAULT_REVISION)
        paths = [self._snapshot(commit, name) for name in names] if commit else []
        return paths if all(path.is_file() for path in paths) else []

    def files_offline(self, revision: str | None) -> list[str]:
        """List the cached files at the commit where the revision was last seen."""
        commit = self._commit_of(revision or DEFAULT_REVISION)
        folder = self._folder / "snapshots" / commit
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) if commit else []

    def add(self, file: RemoteFile, finished: Path) -> Path:
        """Move a file's complete content into the cache. Returns: its snapshot. Raises: StorageError."""
        blob, path = self._blob(file), self._snapshot(file.commit, file.name)
        try:
            blob.parent.mkdir(parents=True, exist_ok=True)
            if finished.stat().st_dev != blob.parent.stat().st_dev:
                moved = blob.with_name(f"{blob.name}.{uuid4().hex[:8]}.incomplete")
                shutil.move(finished, moved)
                finished = moved
            replace_durably(finished, blob)
            return self._link(blob, path)
        except OSError as error:
            raise storage_error(blob, error) from error

    def remember(self, revision: str | None, commit: str) -> None:
        """Record which commit a branch or tag is at. Raises: StorageError."""
        name = revision or DEFAULT_REVISION
        path = self._folder / "refs" / name
        if _COMMIT.fullmatch(name) or _read(path) == commit:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
            written.write_text(commit)
            written.replace(path)
        except OSError as error:
            raise storage_error(path, error) from error

    def discard(self, file: RemoteFile) -> None:
        """Remove a file whose content is wrong."""
        self._snapshot(file.commit, file.name).unlink(missing_ok=True)
        self._blob(file).unlink(missing_ok=True)

    def _commit_of(self, revision: str) -> str:
        commit = revision if _COMMIT.fullmatch(revision) else _read(self._folder / "refs" / revision)
        return commit if _PLAIN.fullmatch(commit) else ""

    def _snapshot(self, commit: str, name: str) -> Path:
        return self._folder / "snapshots" / commit / name

    def _blob(self, file: RemoteFile) -> Path:
        return self._folder / "blobs" / file.etag

    def _link(self, blob: Path, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except FileExistsError:  # another process was faster
            return path
        except OSError:  # a file system without links, where the library moves the file too
            blob.replace(path)
        return path


def checked_file(name: str, url: str, commit: str, etag: str, size: int | None) -> RemoteFile:
    """Make a `RemoteFile` of what a server says: its values become paths. Raises: DownloadError."""
    wrong = not _PLAIN.fullmatch(commit) or not _PLAIN.fullmatch(etag)
    if wrong or not is_safe_name(name) or (size is not None and size < 0):
        raise DownloadError(
            f"{url} can't be fetched: the server gives no usable commit, ETag and size for {name[:200]!r}",
            hint="is HF_ENDPOINT the address of a model hub?",
        )
    return RemoteFile(name, url, commit, etag, size)


def is_safe_name(name: str) -> bool:
    """Whether a name from a server is a path inside the repository."""
    return bool(name) and len(name) < 1024 and "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
