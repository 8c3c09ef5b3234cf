"""Checks of folders and files: free space, read-only disks, owners and permissions, torn files."""

import errno
import json
import os
import stat
import tempfile
import time
from pathlib import Path

from meshd.agents.cluster_service import CheckResult
from meshd.display import size
from meshd.doctor.check import Context, Found, ok, warning, wrong
from meshd.state import read_holder

_TEST_BYTES = 4096
_STATE_SPARE, _MODELS_SPARE = 16 << 20, 1 << 30
"""Free space below which a warning is due: room for records, and for a small model."""
_OTHERS = 0o077
_LONG_S = 60.0
"""Age of a temporary file that a running daemon does not write any more."""


def disks(context: Context) -> Found:
    """Check that each folder can be written, and how much room it has."""
    config = context.config
    yield _disk("state-disk", config.state, _STATE_SPARE, f"use another folder: `--state DIR` (now {config.state})")
    yield _disk("cache-disk", config.cache, _STATE_SPARE, f"use another folder: `--cache DIR` (now {config.cache})")
    models = f"remove models with `meshd rm MODEL`, or use another folder: `--models-dir DIR` (now {config.models_dir})"
    yield _disk("models-disk", config.models_dir, _MODELS_SPARE, models)
    hub = f"remove models with `meshd rm MODEL`, or use another folder: `--hf-cache DIR` (now {config.hf_cache})"
    yield _disk("hf-cache-disk", config.hf_cache, _MODELS_SPARE, hub)


def _disk(check: str, folder: Path, spare_bytes: int, mend: str) -> CheckResult:
    """Write a small file into a folder, or into the nearest one above it that exists, and remove the file again."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    try:
        _write_test(there)
        state = os.statvfs(there)
    except OSError as error:
        return _unwritable(check, there, error, mend)
    free = state.f_bavail * state.f_frsize
    if state.f_files and not state.f_favail:
        return wrong(check, f"{there} has no room for further files: all inodes are in use", f"remove files there, or {mend}")
    if free < spare_bytes:
        return warning(check, f"only {size(free)} are free in {there}", f"free some space, or {mend}")
    return ok(check, f"{size(free)} are free in {there}")


def _write_test(folder: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".doctor-", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(os.urandom(_TEST_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        Path(name).unlink(missing_ok=True)


def _unwritable(check: str, folder: Path, error: OSError, mend: str) -> CheckResult:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return wrong(check, f"the disk of {folder} is full", f"free some space (`df -h {folder}`), or {mend}")
        case errno.EROFS:
            return wrong(check, f"{folder} is on a disk that is mounted read-only", f"sudo mount -o remount,rw {folder}, or {mend}")
        case errno.EACCES | errno.EPERM:
            return wrong(check, f"{folder} can't be written by this user", f"sudo chown -R $(id -un) {folder}, or {mend}")
    return wrong(check, f"{folder} can't be written: {error.strerror or error}", f"check the disk, or {mend}")


def state_folder(context: Context) -> Found:
    """Check owner, permissions and completeness of the files that hold this peer's identity."""
    folder = context.config.state
    if not folder.is_dir():
        return [ok("state-folder", f"{folder} does not exist yet: the first `meshd up` makes it")]
    results = [*_permissions(folder), *_torn(folder)]
    return results or [ok("state-folder", f"{folder} is private and whole")]


def _permissions(folder: Path) -> Found:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()]
    for path, right in ((folder, "700"), *((path, "600") for path in files)):
        state = path.stat()
        if state.st_uid != os.geteuid() and os.geteuid() != 0:
            yield wrong("state-folder", f"{path} belongs to another user", f"sudo chown -R $(id -un) {folder}", path.name)
        elif state.st_mode & _OTHERS:
            found = f"other users may read {path}: its mode is {stat.S_IMODE(state.st_mode):04o}"
            yield wrong("state-folder", found, f"chmod {right} {path}", path.name)


def _torn(folder: Path) -> Found:
    """Find what a crash in the middle of a write leaves behind."""
    for path in sorted(folder.glob(".*.????????")):
        if path.is_file() and (read_holder(folder) is None or time.time() - path.stat().st_mtime > _LONG_S):
            yield warning("state-folder", f"{path} was left by a write that did not end", f"rm {path}", path.name)
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            yield wrong("state-folder", f"{path} is torn: it is no JSON", f"rm {path}, then start `meshd up` again", path.name)
        except OSError as error:
            yield wrong("state-folder", f"{path} can't be read: {error.strerror}", f"sudo chown $(id -un) {path}", path.name)


def state_lock(context: Context) -> Found:
    """Check which daemon uses the state folder."""
    holder = read_holder(context.config.state)
    if holder is None:
        return [ok("state-lock", "no daemon uses the state folder")]
    if context.peer is None:
        found = f"process {holder.pid} uses the state folder, but its API{f' ({holder.api})' if holder.api else ''} does not answer"
        return [wrong("state-lock", found, f"read its log; if it hangs, `kill {holder.pid}`, then `meshd up`")]
    return [ok("state-lock", f"process {holder.pid} uses the state folder")]
