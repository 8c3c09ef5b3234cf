"""Checks a model's tokenizer and chat template before it is fetched or offered. Blocks; needs no event loop and no daemon."""

import subprocess
import sys
from pathlib import Path

import msgspec

import meshd
from meshd.models.text.worker.messages import LENGTH, OUT_OF_MEMORY, Failed, Load, Result, decode_result, encode_frame

CPU_S = 30.0
MEMORY_BYTES = 2 << 30
_WALL_S = 150.0
"""A check that has not taken its processor time is ended then: the machine is overloaded."""


def check_text(header: bytes | Path) -> str:
    """Read the tokenizer and the chat template of a model in a process of its own, and try both.

    `header`: the bytes of a GGUF file up to its weights, or the path of the file.
    Returns: why the model could not answer prompts, in the words of an error message; empty if it could.
    """
    path = str(header) if isinstance(header, Path) else ""
    job = Load(model="", path=path, header=b"" if isinstance(header, Path) else header, cpu_s=CPU_S)
    command = [sys.executable, "-m", "meshd.models.text.worker", str(MEMORY_BYTES)]
    try:
        done = subprocess.run(
            command,
            input=encode_frame(job),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(meshd.__file__).parent.parent,
            timeout=_WALL_S,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"reading its tokenizer and chat template takes more than {_WALL_S:.0f} s"
    result = _result(done.stdout)
    if isinstance(result, Failed):
        return str(result.error())
    if result is not None:
        return ""
    what = f"{MEMORY_BYTES >> 20} MiB of memory" if done.returncode in (OUT_OF_MEMORY, -6) else f"{CPU_S:.0f} s, or fails"
    return f"reading its tokenizer and chat template takes more than {what}"


def _result(output: bytes) -> Result | None:
    """Decode the worker's only result. Returns: None if it ended before that."""
    if len(output) < LENGTH.size:
        return None
    try:
        result: Result = decode_result(output[LENGTH.size :])
    except msgspec.DecodeError:
        return None
    return result
