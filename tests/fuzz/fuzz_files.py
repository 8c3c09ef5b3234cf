"""Opens mutated model files. The first failure ends the run and prints the options that repeat the case.

    python tests/fuzz/fuzz_files.py [--seconds 60 | --count N] [--seed N] [--first CASE]

Required: opening a GGUF file, a split GGUF file or a Hugging Face folder gives a model or a MeshdError, within seconds and with
bounded memory. No file or mapping stays open, no unfinished file stays on the disk, and a weight that is not a finite number is
always reported.
"""

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from meshd.errors import MeshdError, ModelFileError
from meshd.kernels.weights.load import dequantise, load_matrix
from meshd.models.architectures import spec_from_metadata
from meshd.models.cards import card_from_gguf
from meshd.models.files.gguf import GgufFile
from meshd.models.files.gguf_header import TensorInfo
from meshd.models.files.safetensors_file import DTYPES, SafetensorsFolder
from meshd.models.importing.huggingface import plan_import
from meshd.models.importing.import_model import import_to
from meshd.models.text.template import template_from_gguf
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.tensors import border_shapes, layer_shapes, rope_shape
from meshd.types import ModelId
from tiny.bad_files import (
    CONFIGS,
    PARTS,
    mutate_binary,
    mutate_json,
    mutate_metadata,
    mutate_safetensors,
    mutate_values,
    plant_nan,
    plant_nan_in_gguf,
    small_folder,
    small_gguf,
)

CASE_S = 10
DATA_BYTES = 192 << 20
"""Data memory that the process may allocate in addition to what it has when the cases begin. More raises MemoryError."""
TRACED_BYTES = 2 << 20
"""Memory that a case may allocate in addition to `TRACED_FACTOR` times its files, for text buffers and the tokenizer's tables."""
TRACED_FACTOR = 24
"""Memory that a case may allocate, as a multiple of the size of its files."""
TRACE_EVERY = 40
LEAK_CHECK_EVERY = 500


class Hang(BaseException):
    """A case took too long. Not an `Exception`, so that no handler in the tested code catches it."""


def use_gguf(path: Path) -> None:
    """Load a file's weights, tokenizer, chat template and card, as meshd does. A MeshdError in one does not skip the next."""
    with GgufFile.open(path) as file:
        for name in file.tensors:
            with suppress(MeshdError):
                tensor = file.tensor(name)
                load_matrix(tensor) if len(tensor.shape) == 2 else dequantise(tensor)
                if len(tensor.shape) == 2:
                    dequantise(tensor)
        with suppress(MeshdError):
            tokenizer = tokenizer_from_gguf(file.metadata)
            tokenizer.decode(tokenizer.encode('!"#$ é <s>', add_special=True, parse_special=True))
        with suppress(MeshdError):
            template_from_gguf(file.metadata).render([{"role": "user", "content": "!"}])
        card_from_gguf(file, name="x", ref="x", model_id=ModelId("0" * 32))


class Fuzzer:
    """Makes cases: damages a valid model in a folder, and opens it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        folder = root / "hf"
        folder.mkdir()
        self._folder, self._seeds = folder, small_folder(folder)
        with SafetensorsFolder.open(folder) as opened:
            self._shapes = opened.tensors
        self._gguf = (small_gguf(), small_gguf(pieces=True))
        self._parts = {f"m-0000{part + 1}-of-00002.gguf": small_gguf(part) for part in range(2)}
        self._target = root / "made.gguf"
        self._kinds: dict[str, tuple[int, Callable[[random.Random], Callable[[], None]]]] = {
            "gguf": (5, self._case_gguf), "safetensors": (4, self._case_safetensors), "json": (2, self._case_json),
            "split": (1, self._case_split), "nan": (1, self._case_nan), "plan": (2, self._case_plan),
            "gguf nan": (1, self._case_gguf_nan),
        }  # fmt: skip
        self.outcomes: Counter[str] = Counter()
        self._changed: set[str] = set()

    def check_seeds(self) -> None:
        """Check that the undamaged models open without an error. Otherwise no case would test anything."""
        for data in self._gguf:
            (self._root / "x.gguf").write_bytes(data)
            use_gguf(self._root / "x.gguf")
            with GgufFile.open(self._root / "x.gguf") as file:
                tokenizer_from_gguf(file.metadata)
        for name, data in self._parts.items():
            (self._root / name).write_bytes(data)
        self._import(self._root / next(iter(self._parts)))
        self._import(self._folder)

    def run(self, dice: random.Random, *, traced: bool) -> None:
        """Run one case. With `traced`, check its memory too. Raises: any error but MeshdError, which the tested code may raise."""
        kind = dice.choices(list(self._kinds), [weight for weight, _ in self._kinds.values()])[0]
        use = self._kinds[kind][1](dice)
        size = sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file()) if traced else 0
        if traced:
            tracemalloc.start()
        try:
            use()
            self.outcomes[f"{kind} used"] += 1
        except MeshdError as error:
            if len(str(error).encode()) > 4000:  # a message that cannot be printed fails to encode
                raise AssertionError("an error message of more than 4000 bytes") from error
            self.outcomes[f"{kind} refused"] += 1
        finally:
            if traced:
                _, most = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                assert most < TRACED_FACTOR * size + TRACED_BYTES, f"{most} bytes were allocated for files of {size}"
            self._restore()

    def _restore(self) -> None:
        assert not self._target.exists(), "an unfinished file is left"
        for name in self._changed:
            (self._folder / name).write_bytes(self._seeds[name])
        self._changed.clear()

    def _change(self, name: str, data: bytes) -> None:
        self._changed.add(name)
        (self._folder / name).write_bytes(data)

    def _import(self, path: Path, quant: str | None = None) -> None:
        try:
            import_to(self._target, path, quant, lambda _: None, lambda _: None)
            use_gguf(self._target)
        finally:
            if sys.exc_info()[0] is None or self._target.exists():
                self._target.unlink(missing_ok=True)

    def _case_gguf(self, dice: random.Random) -> Callable[[], None]:
        path = self._root / "x.gguf"
        path.write_bytes(mutate_binary(dice, dice.choice(self._gguf), 2600))
        return lambda: use_gguf(path)

    def _case_safetensors(self, dice: random.Random) -> Callable[[], None]:
        name = dice.choice([name for name in self._seeds if name.endswith(".safetensors")])
        self._change(name, mutate_safetensors(dice, self._seeds[name]))
        quant = dice.choice((None, None, "q8", "q4"))
        return lambda: self._import(self._folder, quant)

    def _case_json(self, dice: random.Random) -> Callable[[], None]:
        others = [name for name in self._seeds if name.endswith(".json")]
        name = dice.choice(("config.json", dice.choice(others)))
        data = self._seeds[name]
        if name == "config.json":
            data = json.dumps(json.loads(data) | dice.choice(CONFIGS)).encode()
        self._change(name, mutate_json(dice, data))
        return lambda: self._import(self._folder)

    def _case_plan(self, dice: random.Random) -> Callable[[], None]:
        seed = json.loads(self._seeds["config.json"]) | dice.choice(CONFIGS)
        config = mutate_values(dice, seed)
        shapes = dict(self._shapes)
        for _ in range(dice.choice((0, 0, 1, 3))):
            name = dice.choice((*shapes, *(f"model.layers.{dice.choice((0, 0, 1, 10**7))}.{part}" for part in PARTS)))
            shapes[name] = dice.choice(tuple(DTYPES)), tuple(dice.choices((0, 1, 2, 16, 32, 1 << 59), k=dice.randrange(6)))

        def use() -> None:
            plan = plan_import(config, shapes)
            infos = {tensor.name: TensorInfo("F32", tensor.shape, 0, 0) for tensor in plan.tensors}
            metadata = mutate_metadata(dice, plan.metadata) if dice.random() < 0.7 else plan.metadata
            spec = spec_from_metadata("x", metadata, infos)
            layer_shapes(spec)
            border_shapes(spec)
            rope_shape(spec)

        return use

    def _case_split(self, dice: random.Random) -> Callable[[], None]:
        broken = dice.choice(list(self._parts))
        for name, data in self._parts.items():
            (self._root / name).write_bytes(mutate_binary(dice, data, 900) if name == broken else data)
        return lambda: self._import(self._root / broken)

    def _case_nan(self, dice: random.Random) -> Callable[[], None]:
        name = dice.choice([name for name in self._seeds if name.endswith(".safetensors")])
        self._change(name, plant_nan(dice, self._seeds[name]))

        def use() -> None:
            try:
                self._import(self._folder, dice.choice((None, "q8", "q4")))
            except ModelFileError as error:
                if "no finite number" in error.message:
                    raise
                raise AssertionError(f"a weight that is no number is reported as: {error}") from error
            raise AssertionError("a weight that is no number was accepted")

        return use

    def _case_gguf_nan(self, dice: random.Random) -> Callable[[], None]:
        path = self._root / "x.gguf"
        data, name = plant_nan_in_gguf(dice, self._gguf[0])
        path.write_bytes(data)

        def use() -> None:
            with GgufFile.open(path) as file:
                tensor = file.tensor(name)
                try:
                    load_matrix(tensor) if len(tensor.shape) == 2 else dequantise(tensor)
                except ModelFileError as error:
                    if name in error.message:
                        raise
                    raise AssertionError(f"a weight of {name} that is no number is reported as: {error}") from error
            raise AssertionError(f"a weight of {name} that is no number was loaded")

        return use

    def check_leaks(self) -> None:
        """Check that no case has left one of its files open or mapped."""
        gc.collect()
        if Path("/proc/self/maps").exists():
            mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(self._root) in line]
            assert not mapped, f"still mapped: {mapped[:3]}"
            held = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if number.isdecimal()
                    and os.path.lexists(f"/proc/self/fd/{number}")]  # fmt: skip
            assert not [path for path in held if str(self._root) in path], f"still open: {held}"


def limit_memory() -> None:
    """Limit the data memory of this process to its current size plus `DATA_BYTES`."""
    status = Path("/proc/self/status")
    if status.exists():
        held = int(next(line for line in status.read_text().splitlines() if line.startswith("VmData")).split()[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (held + DATA_BYTES, held + DATA_BYTES))


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Hang(f"a case takes longer than {CASE_S} s")


def main() -> None:
    """Run numbered cases. With `--seed`, `--first` and `--count 1`, repeat one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--count", type=int, help="number of cases; replaces --seconds")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    warnings.simplefilter("ignore")  # numpy warns of numbers that overflow
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="meshd-fuzz-", dir=memory if memory.is_dir() else None))
    signal.signal(signal.SIGALRM, interrupt)
    case, begun = args.first, time.monotonic()
    try:
        fuzzer = Fuzzer(root)
        fuzzer.check_seeds()
        limit_memory()
        while case < args.first + args.count if args.count else time.monotonic() < begun + args.seconds:
            signal.setitimer(signal.ITIMER_REAL, CASE_S)
            fuzzer.run(random.Random(f"{args.seed} {case}"), traced=case % TRACE_EVERY == 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if case % LEAK_CHECK_EVERY == 0:
                fuzzer.check_leaks()
            case += 1
        fuzzer.check_leaks()
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
            sys.exit(f"case {case} of seed {args.seed}: repeat it with --seed {args.seed} --first {case} --count 1")
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)
    count, took = case - args.first, time.monotonic() - begun
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(fuzzer.outcomes.items()))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{count} files in {took:.0f} s, {count / took:.0f} a second, {most} MiB at most ({outcomes}): no failure")


if __name__ == "__main__":
    main()
