"""How true the answers are: logits against the same weights in `transformers` in float32, over real text; llama.cpp beside.

    python tests/benchmarks/bench_fidelity.py [--model smollm2:135m | FILE.gguf] [--kinds file Q4_0 ... | all] [--exact]
        [--positions 2000] [--context 1000] [--llama-python PYTHON]

`file` is the file as it is; for any other kind its dequantised weights are quantised anew, all matrices alike (those whose rows are
no whole blocks of the kind become Q8_0), and are judged against what they then are. `--llama-python`: an interpreter that has
`llama_cpp`, whose logits are then measured beside ours, and whose quantisers make Q4_K, Q5_K, Q6_K and IQ4_NL (see
tests/lib/reference/llama_peer.py). The text lies in tests/lib/reference/real_text.txt and is read in windows of `--context` tokens,
each on its own: every position counts, with all before it in its window as its context. Perplexity
is over the text's own next tokens.
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
"""How much less often than llama.cpp's the top token may be right, and how much larger the divergence may be."""


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
    print(f"most memory of this process: {peak_mb:.0f} MB")


def find(model: str) -> Path:
    """A model of the cache, or a file."""
    stored = None if Path(model).exists() else Store(Settings()["models-dir"].value).get(model)
    return stored.path if stored else Path(model)


def measure(path: Path, kind: str, texts: list[list[int]], backends: list[str], llama: LlamaCpp | None) -> None:
    """One line for each that computes."""
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
            about = llama.open(path, max(map(len, texts)))
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
        print(about)
    report(kind, found)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def load(name: str, spec: ModelSpec, file: GgufFile) -> LoadedLayers:
    backend = make_backend(name, psutil.cpu_count(logical=False) or 1)
    return backend.load(spec, LayerRange(0, spec.layers), file, embedding=True, head=True)


def twice(rows: Iterator[F32]) -> tuple[Iterator[F32], Iterator[F32]]:
    """The same parts for two readers in step."""
    kept: list[F32] = []

    def first() -> Iterator[F32]:
        for part in rows:
            kept.append(part)
            yield part

    def second() -> Iterator[F32]:
        while kept:
            yield kept.pop()

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
        apart = np.subtract(ours.hits, theirs.hits, dtype=float)
        error = 100 * apart.std() / math.sqrt(len(apart))  # of the mean, position by position
        verdicts = {
            f"top token {100 * apart.mean():+.2f} points (error {error:.2f})": ours.top_share >= theirs.top_share - TOP_MARGIN,
            f"KL {ours.divergence / theirs.divergence:.3f} times": ours.divergence <= DIVERGENCE_MARGIN * theirs.divergence,
            f"perplexity {ours.perplexity / theirs.perplexity - 1:+.3%}": ours.perplexity <= DIVERGENCE_MARGIN * theirs.perplexity,
        }
        print(f"{'':6}  against llama.cpp: " + ", ".join(f"{what} {'ok' if ok else 'WORSE'}" for what, ok in verdicts.items()))


if __name__ == "__main__":
    main()
