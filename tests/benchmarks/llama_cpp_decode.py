"""Measure llama.cpp's batched decode with what `bench_throughput.py` asks of meshd: as many answers at once, without a server.

    PYTHON tests/benchmarks/llama_cpp_decode.py MODEL.gguf --clients 1 8 --prompt 30 --tokens 128 --threads 2

PYTHON has the package llama-cpp-python, which is compiled when it is installed, and which meshd does not need. Prints one line of
JSON: tokens/s of all answers together for each number of clients, with the time that their prompts take.
"""

import argparse
import ctypes
import json
import time

import llama_cpp  # type: ignore[import-not-found]
import numpy as np


def measure(model: object, clients: int, prompt: int, tokens: int, threads: int) -> float:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = clients * (-(-(prompt + tokens) // 256) * 256)
    params.n_seq_max, params.n_batch, params.n_ubatch = clients, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(512, 0, clients)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, sequence, whether it is sampled). Returns: the sampled tokens, greedy."""
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, sampled) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, sampled
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp can't decode the batch")
        picked = []
        for index, row in enumerate(rows):
            if row[3]:
                logits = ctypes.cast(llama_cpp.llama_get_logits_ith(context, index), ctypes.POINTER(ctypes.c_float * vocab))
                picked.append(int(np.frombuffer(logits.contents, np.float32).argmax()))
        return picked

    started = time.perf_counter()
    newest: list[int] = []
    for client in range(clients):
        ids = [(client * 7919 + place * 31) % 40_000 + 100 for place in range(prompt)]
        newest += decode([(token, place, client, place == prompt - 1) for place, token in enumerate(ids)])
    for step in range(tokens - 1):
        newest = decode([(token, prompt + step, client, True) for client, token in enumerate(newest)])
    took_s = time.perf_counter() - started
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return clients * tokens / took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(given.model.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp can't load {given.model}")
    print(json.dumps([measure(model, clients, given.prompt, given.tokens, given.threads) for clients in given.clients]))


if __name__ == "__main__":
    main()
