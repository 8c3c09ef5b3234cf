"""Compare the logits of meshd, and of llama.cpp if wanted, with those of `transformers` in float32, for one model and a real text.

    python tests/benchmarks/bench_fidelity.py [--model smollm2:135m | FILE.gguf] [--kinds file Q4_0 ... | all] [--exact]
        [--positions 2000] [--context 1000] [--llama-python PYTHON]

The kind `file` measures the model's file as it is. For any other kind, the benchmark dequantises all matrices, quantises them again
to that kind, and measures the new file, with `transformers` on the same requantised weights. A matrix whose rows are not a whole
number of blocks becomes Q8_0 instead.

`--llama-python` names a Python interpreter that can import `llama_cpp`. Then llama.cpp's logits are measured too, and llama.cpp
quantises to Q4_K, Q5_K, Q6_K and IQ4_NL (see tests/lib/reference/llama_peer.py).

The text is tests/lib/reference/real_text.txt, read in separate windows of `--context` tokens. Every position is measured, with all
earlier positions of its window as context. The perplexity comes from the probability of the text's next token at each position.
"""

import argparse
import contextlib
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

import numpy as np
import psutil

from meshd.config import Settings
from meshd.errors import ModelFileError
from meshd.kernels.backend import EXACT, LoadedLayers
from meshd.kernels.registry import make_backend
from meshd.kernels.weights import load as quant
from meshd.models.cards import card_from_gguf
from meshd.models.files.gguf import GgufFile
from meshd.models.store.store import Store
from meshd.types import LayerRange, ModelId, ModelSpec
from reference.fidelity import ROWS, Fidelity, compare, stage_rows, windows
from reference.llama_peer import LlamaCpp
from reference.originals import F32, Original
from reference.requantise import requantise

KINDS = ("file", *(kind for kind in quant.KINDS if kind != "F32"))
FAST = "onnxruntime"
TOP_MARGIN, DIVERGENCE_MARGIN = 0.003, 1.1
"""How much worse than llama.cpp meshd may be: in the share of right top tokens, and as a factor of divergence and perplexity."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--kinds", nargs="+", default=["file"], choices=[*KINDS, "all"])
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--exact", action="store_true", help="measure full-precision activations too")
    options = parser.parse_args()
    kinds = KINDS if "all" in options.kinds else options.kinds
    llama = LlamaCpp(options.llama_python) if options.llama_python else None
    with GgufFile.open(find(options.model)) as file, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if llama:
            stack.callback(llama.close)
        texts = windows(file, options.positions, options.context)
        print(f"{options.model}: {sum(map(len, texts))} positions in {len(texts)} windows")
        for kind in kinds:
            path = Path(file.name) if kind == "file" else Path(folder) / "model.gguf"
            if kind != "file":
                made = requantise(file, path, kind, llama.quantise if llama else None)
                print(f"{kind}: " + ", ".join(f"{count} matrices in {name}" for name, count in made.items()))
            measure(path, kind, texts, [FAST, FAST + EXACT] if options.exact else [FAST], llama)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(f"peak memory of this process: {peak_mb:.0f} MB")


def find(model: str) -> Path:
    """Return the path of a stored model or of a file."""
    stored = None if Path(model).exists() else Store(Settings()["models-dir"].value).get(model)
    return stored.path if stored else Path(model)


def measure(path: Path, kind: str, texts: list[list[int]], backends: list[str], llama: LlamaCpp | None) -> None:
    """Measure the original, all backends and llama.cpp on one file. Print one line for each of them."""
    started = time.perf_counter()
    with GgufFile.open(path) as file:
        original = Original(file)
        found = {"original": Fidelity()}
        loaded: dict[str, LoadedLayers] = {}
        try:
            spec = card_from_gguf(file, name=kind, ref=f"file:{path}", model_id=ModelId("0" * 32)).spec
            for name in backends:
                loaded[name] = load(name, spec, file)
        except ModelFileError as error:
            print(f"meshd: {error}")
        found |= {name: Fidelity() for name in loaded}
        if llama:
            summary = llama.open(path, max(map(len, texts)))
            found["llama.cpp"] = Fidelity()

        for ids in texts:
            rows: dict[str, Iterable[F32]] = {}
            for name, layers in loaded.items():
                rows[name] = stage_rows(layers.stage(layers.layers), spec, ids)
            if llama:
                rows["llama.cpp"] = llama.rows(ids, ROWS)
            first, second = twice(original.rows(ids, ROWS))
            compare(ids, first, [(found["original"], second), *((found[name], rows[name]) for name in rows)])
        for layers in loaded.values():
            layers.close()
    if llama:
        print(summary)
    report(kind, found)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def load(name: str, spec: ModelSpec, file: GgufFile) -> LoadedLayers:
    backend = make_backend(name, psutil.cpu_count(logical=False) or 1)
    return backend.load(spec, LayerRange(0, spec.layers), file, embedding=True, head=True)


def twice(rows: Iterator[F32]) -> tuple[Iterator[F32], Iterator[F32]]:
    """Return two iterators over the same items. The second one yields only items that were already read from the first one."""
    unread: list[F32] = []

    def first() -> Iterator[F32]:
        for part in rows:
            unread.append(part)
            yield part

    def second() -> Iterator[F32]:
        while unread:
            yield unread.pop()

    return first(), second()


def report(kind: str, found: dict[str, Fidelity]) -> None:
    print(f"{kind:6}  {'':17} same top token   mean KL     perplexity   largest difference")
    for name, fidelity in found.items():
        print(
            f"{'':6}  {name:17} {fidelity.top_share:10.2%}   {fidelity.mean_divergence:10.3e}   "
            f"{fidelity.perplexity:9.4f}   {fidelity.largest:9.5f}"
        )
    if {FAST, "llama.cpp"} <= found.keys():
        ours, theirs = found[FAST], found["llama.cpp"]
        difference = np.subtract(ours.hits, theirs.hits, dtype=float)
        error = 100 * difference.std() / math.sqrt(len(difference))  # standard error of the mean over positions
        verdicts = {
            f"top token {100 * difference.mean():+.2f} points (error {error:.2f})": ours.top_share >= theirs.top_share - TOP_MARGIN,
            f"KL {ours.divergence / theirs.divergence:.3f} times": ours.divergence <= DIVERGENCE_MARGIN * theirs.divergence,
            f"perplexity {ours.perplexity / theirs.perplexity - 1:+.3%}": ours.perplexity <= DIVERGENCE_MARGIN * theirs.perplexity,
        }
        print(f"{'':6}  against llama.cpp: " + ", ".join(f"{what} {'ok' if ok else 'WORSE'}" for what, ok in verdicts.items()))


if __name__ == "__main__":
    main()
