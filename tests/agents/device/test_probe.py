import asyncio
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest

from meshd.agents.device import probe as probing
from meshd.agents.device.probe import probe, read_trial, report
from meshd.agents.device.probe_record import CACHE_FILE, BackendTrial
from meshd.clock import SystemClock
from meshd.errors import LocalFault, StorageError
from meshd.numerics import NumericsId, is_promised
from meshd.types import Rates

CLOCK = SystemClock()
NUMERICS = NumericsId("onnxruntime/int8/512/0123456789abcdef")
TORCH_NUMERICS = NumericsId("torch/f32/512/fedcba9876543210/varies")


def rates(decode_bytes_s: float = 1e9, layer_overhead_s: float = 1e-4) -> Rates:
    return Rates(
        decode_bytes_s=decode_bytes_s,
        prefill_flops_s=1e10,
        memory_bytes_s=1e10,
        attention_bytes_s=1e9,
        disk_bytes_s=0.0,
        layer_overhead_s=layer_overhead_s,
    )


@dataclass
class Trials:
    """Replaces the measuring processes and returns prepared results."""

    results: dict[str, BackendTrial]
    asked: int = 0

    async def __call__(self, backend: str, threads: int, budget_s: float, deadline_s: float) -> BackendTrial:
        self.asked += 1
        assert 0 < budget_s < 15
        return self.results[backend]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    trials = Trials(
        {
            "onnxruntime": BackendTrial(backend="onnxruntime", rates=rates(2e9), numerics=NUMERICS),
            "torch": BackendTrial(backend="torch", rates=rates(1e9), numerics=TORCH_NUMERICS),
        }
    )
    monkeypatch.setattr(probing, "_try", trials)
    monkeypatch.setattr(probing, "_available", lambda: ("onnxruntime", "torch"))
    monkeypatch.setattr(probing, "disk_read_rate", lambda _folder: 5e8)
    return trials


async def test_the_fastest_backend_is_advertised_with_its_rates(tmp_path: Path, trials: Trials) -> None:
    result = await probe(tmp_path, clock=CLOCK, threads=2, memory_cap_bytes=2**30, roles=("compute",))
    capability = result.capability
    assert (capability.backend, capability.threads, capability.roles) == ("onnxruntime", 2, ("compute",))
    assert capability.numerics == NUMERICS
    assert capability.rates == msgspec.structs.replace(rates(2e9), disk_bytes_s=5e8)
    assert capability.memory_free_bytes <= 2**30
    assert not result.cached


async def test_overhead_counts_when_backends_are_compared(tmp_path: Path, trials: Trials) -> None:
    trials.results["onnxruntime"] = BackendTrial(backend="onnxruntime", rates=rates(2e9, layer_overhead_s=0.1))
    assert (await probe(tmp_path, clock=CLOCK)).capability.backend == "torch"


async def test_a_second_start_uses_the_cache_and_a_refresh_measures(tmp_path: Path, trials: Trials) -> None:
    first = await probe(tmp_path, clock=CLOCK)
    again = await probe(tmp_path, clock=CLOCK)
    assert trials.asked == 2
    assert again.cached
    assert (again.capability.rates, again.capability.numerics) == (first.capability.rates, NUMERICS)
    await probe(tmp_path, clock=CLOCK, refresh=True)
    assert trials.asked == 4
    await probe(tmp_path, clock=CLOCK, threads=1)
    assert trials.asked == 6


async def test_an_environment_in_which_libraries_compute_otherwise_is_measured_again(
    tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    await probe(tmp_path, clock=CLOCK)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert not (await probe(tmp_path, clock=CLOCK)).cached


async def test_daemons_that_start_together_measure_once(tmp_path: Path, trials: Trials) -> None:
    results = await asyncio.gather(*(probe(tmp_path / "new", clock=CLOCK) for _ in range(3)))
    assert trials.asked == 2
    assert len({result.capability.rates for result in results}) == 1


async def test_if_a_backend_fails_the_other_is_used(tmp_path: Path, trials: Trials) -> None:
    trials.results["onnxruntime"] = BackendTrial(backend="onnxruntime", error="no such instruction")
    result = await probe(tmp_path, clock=CLOCK)
    assert result.capability.backend == "torch"
    assert report(result)["backends"][0]["error"] == "no such instruction"


async def test_if_all_backends_fail_the_error_says_why_and_nothing_is_cached(tmp_path: Path, trials: Trials) -> None:
    for name in trials.results:
        trials.results[name] = BackendTrial(backend=name, error="broken")
    with pytest.raises(LocalFault, match="onnxruntime: broken; torch: broken"):
        await probe(tmp_path, clock=CLOCK)
    assert not (tmp_path / CACHE_FILE).exists()


async def test_a_folder_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path, trials: Trials) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/below"):
        await probe(tmp_path / "file/below", clock=CLOCK)


async def test_progress_names_what_is_measured_and_goes_up(tmp_path: Path, trials: Trials) -> None:
    reported: list[tuple[str, float]] = []
    await probe(tmp_path, clock=CLOCK, progress=lambda what, fraction: reported.append((what, fraction)))
    assert [what for what, _ in reported] == ["waiting", "disk", "onnxruntime", "torch", "done"]
    assert [fraction for _, fraction in reported] == sorted(fraction for _, fraction in reported)


async def test_the_report_has_stable_keys_and_is_json(tmp_path: Path, trials: Trials) -> None:
    made = report(await probe(tmp_path, clock=CLOCK))
    assert list(made) == [
        "processor",
        "cores",
        "threads",
        "backend",
        "numerics",
        "rates",
        "memory_total_bytes",
        "memory_free_bytes",
        "memory_bound_by",
        "power_w",
        "backends",
        "measured_at",
        "cached",
        "elapsed_s",
    ]
    assert msgspec.json.decode(msgspec.json.encode(made))["rates"]["disk_bytes_s"] == 5e8


def test_only_the_last_line_of_a_process_output_is_read() -> None:
    printed = BackendTrial(backend="torch", rates=rates(), numerics=TORCH_NUMERICS)
    output = b"a library's greeting\n" + msgspec.json.encode(printed) + b"\n"
    assert read_trial("torch", 0, output, b"warning\n", 12.0) == msgspec.structs.replace(printed, power_w=12.0)


@pytest.mark.parametrize(
    ("status", "output", "complaints", "error"),
    [
        (1, b"", b"Traceback ...\nImportError: no torch\n", "ImportError: no torch"),
        (-9, b"", b"", "its process ended with status -9"),
        (0, b"not json\n", b"", "its process ended with status 0"),
    ],
)
def test_a_process_that_fails_reports_why(status: int, output: bytes, complaints: bytes, error: str) -> None:
    assert read_trial("torch", status, output, complaints, None) == BackendTrial(backend="torch", error=error)


async def test_a_real_process_reports_its_error() -> None:
    trial = await probing._try("abacus", 1, 1.0, 30.0)
    assert trial.rates is None
    assert "abacus" in trial.error


async def test_a_process_that_hangs_is_ended_at_the_deadline() -> None:
    trial = await probing._try("torch", 1, 30.0, 0.05)
    assert trial.error == "no result after 0 s"


async def test_cancelling_ends_the_process() -> None:
    before = psutil.Process().children()  # earlier tests may have left a server process that forks daemons
    task = asyncio.create_task(probing._try("torch", 1, 30.0, 30.0))
    await asyncio.sleep(0.2)
    measuring = set(psutil.Process().children()) - set(before)
    assert measuring
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not any(process.is_running() for process in measuring)


async def test_a_real_backend_is_measured() -> None:
    trial = await probing._try("onnxruntime", 1, 1.0, 60.0)
    assert trial.error == ""
    assert is_promised(trial.numerics)
    assert trial.rates is not None
    assert min(msgspec.structs.astuple(msgspec.structs.replace(trial.rates, disk_bytes_s=1.0, layer_overhead_s=1.0))) > 0
