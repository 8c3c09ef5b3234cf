"""Serves llama.cpp's logits and quantisers to `llama_peer.py`, over stdin and stdout. Its interpreter must have `llama_cpp`.

Every request is one line of JSON. The answer to "open" is one line of JSON; the other answers are raw bytes, whose number the
client computes:

    {"open": path, "context": tokens}           -> {"vocab": n, "about": "versions and settings"}
    {"rows": token ids}                         -> [tokens, vocab] float32, in parts as they are computed
    {"quantise": ggml type, "rows": r, "columns": c, "bytes": n} and float32 values -> n bytes
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

BATCH = 128
"""Number of tokens in a step; the logits of all of them are in memory at once."""
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
GGML_TYPE_F32 = 0


class Model:
    """A loaded model file. KV is in float32 and flash attention is off; other settings are llama.cpp's defaults."""

    def __init__(self, path: str, context: int) -> None:
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        assert self._model, f"llama.cpp can't load {path}"
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = THREADS
        settings.type_k = settings.type_v = GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        assert self._context, f"llama.cpp can't make a context of {context} tokens"
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def answer(self, ids: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            self._batch.n_tokens = len(part)
            for index, token in enumerate(part):
                self._batch.token[index], self._batch.pos[index] = token, start + index
                self._batch.n_seq_id[index], self._batch.seq_id[index][0] = 1, 0
                self._batch.logits[index] = 1
            failed = llama_cpp.llama_decode(self._context, self._batch)
            assert not failed, f"llama_decode: {failed}"
            logits = llama_cpp.llama_get_logits(self._context)
            sys.stdout.buffer.write(np.ctypeslib.as_array(logits, (len(part), self.vocab)))
            sys.stdout.buffer.flush()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def about() -> str:
    settings = f"{THREADS} threads, batches of {BATCH}, KV float32, no flash attention"
    return f"llama-cpp-python {llama_cpp.__version__}; {settings}; {llama_cpp.llama_print_system_info().decode().strip()}"


def quantise(request: dict[str, Any]) -> bytes:
    rows, columns = request["rows"], request["columns"]
    values = np.frombuffer(sys.stdin.buffer.read(4 * rows * columns), np.float32)
    out = ctypes.create_string_buffer(request["bytes"])
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    size = chunk(request["quantise"], values.ctypes.data, out, 0, rows, columns, None)
    assert size == len(out), f"{size} bytes, not {len(out)}"
    return out.raw


def main() -> None:
    llama_cpp.llama_backend_init()
    model: Model | None = None
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        if "open" in request:
            if model:
                model.close()
            model = Model(request["open"], request["context"])
            answer = {"vocab": model.vocab, "about": about()}
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        elif "quantise" in request:
            sys.stdout.buffer.write(quantise(request))
        elif model:
            model.answer(request["rows"])
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
