"""Runs llama.cpp in another Python interpreter, since meshd does not depend on it. To build that interpreter's environment:

python -m venv other && CMAKE_ARGS=-DLLAVA_BUILD=OFF other/bin/pip install llama-cpp-python     # compiles for about ten minutes
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class LlamaCpp:
    """A process that runs `llama_cpp_side.py`."""

    def __init__(self, python: Path) -> None:
        """`python`: an interpreter that can import `llama_cpp`."""
        side = Path(__file__).with_name("llama_cpp_side.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([python, str(side)], **pipes)
        self._vocab = 0

    def open(self, path: Path, context: int) -> str:
        """Load a model, and unload the previous one. Returns: a text with the version and settings of llama.cpp."""
        self._ask({"open": str(path), "context": context})
        assert self._process.stdout
        opened = json.loads(self._process.stdout.readline() or b"{}")
        if not opened:
            raise RuntimeError(f"llama.cpp ended when it was to load {path}")
        self._vocab = opened["vocab"]
        return opened["about"]

    def rows(self, ids: Sequence[int], at_once: int) -> Iterator[F32]:
        """Yield the logits after each token of a text, in parts of `[at_once, vocab]`. The caller must read all parts."""
        self._ask({"rows": list(ids)})
        for start in range(0, len(ids), at_once):
            shape = min(at_once, len(ids) - start), self._vocab
            yield np.frombuffer(self._read(4 * shape[0] * shape[1]), np.float32).reshape(shape)

    def quantise(self, values: F32, kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        """Quantise `[rows, columns]`. Returns: the blocks, `[rows, bytes]`."""
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = values.shape
        count = rows * columns // block * size
        self._ask({"quantise": int(kind), "rows": rows, "columns": columns, "bytes": count}, values.tobytes())
        return np.frombuffer(self._read(count), np.uint8).reshape(rows, -1)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, request: dict[str, Any], more: bytes = b"") -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n" + more)
        self._process.stdin.flush()

    def _read(self, count: int) -> bytes:
        assert self._process.stdout
        data = self._process.stdout.read(count)
        if len(data) != count:
            raise RuntimeError(f"llama.cpp ended within an answer: {len(data)} of {count} bytes came")
        return data
