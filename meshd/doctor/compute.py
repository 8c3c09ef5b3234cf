"""Checks of the backends: that each computes, computes right, and how fast the device was measured to be."""

import sys
from typing import Annotated

import msgspec

from meshd.agents.cluster_service import CheckResult
from meshd.agents.device.memory import usable_cores
from meshd.agents.device.probe import probe_key, run_module
from meshd.agents.device.probe_record import CACHE_FILE, ProbeRecord, load_record
from meshd.display import flops, rate
from meshd.doctor.check import Context, Found, ok, warning, wrong
from meshd.kernels.registry import ACCELERATED, available_backends
from meshd.numerics import UNKNOWN, NumericsId

NUMERICS_S = 90.0
"""Deadline of a backend's small network. Most of the time is for loading its library: 2 to 20 s."""
_AUTO = "auto"
MOST_ERROR = 0.02
"""Largest relative error of the scores. Measured: onnxruntime, whose products round activations to 8 bits, 0.005; torch 2e-6."""


class NumericsResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend computed."""

    backend: str
    numerics: NumericsId
    tokens: tuple[int, ...]
    expected: tuple[int, ...]
    error: Annotated[float, msgspec.Meta(ge=0)]
    """Largest difference of a score from the reference, relative to the largest score."""
    seconds: float
    """For one prompt and the tokens, after the weights were loaded."""

    @property
    def right(self) -> bool:
        return self.tokens == self.expected and self.error <= MOST_ERROR


async def backends(context: Context) -> Found:
    """Compute a small known network with each backend that this device would use."""
    wanted = context.config.backend
    installed = available_backends()
    if not installed:
        mend = f"{sys.executable} -m pip install --upgrade meshd-edge"
        return [wrong("backend", "no backend is installed: torch and onnxruntime are missing", mend)]
    if wanted not in (_AUTO, *installed, *ACCELERATED):
        return [wrong("backend", f"backend {wanted} is not installed here", f"start `meshd up` with `--backend {installed[0]}`")]
    names = installed if wanted == _AUTO else (context.config.wanted_backend,)
    record = _stored(context, names)
    before = {trial.backend: trial.numerics for trial in record.trials} if record is not None else {}
    threads = context.config.threads or usable_cores()
    return [await _numerics(name, threads, installed, before.get(name, UNKNOWN)) for name in names]


async def _numerics(name: str, threads: int, installed: tuple[str, ...], before: NumericsId) -> CheckResult:
    others = [each for each in installed if not name.startswith(each)]
    mend = f"start `meshd up` with `--backend {others[0]}`" if others else f"{sys.executable} -m pip install --upgrade meshd-edge"
    try:
        status, output, errors = await run_module("meshd.doctor.numerics", name, threads, deadline_s=NUMERICS_S)
    except TimeoutError:
        return wrong("backend", f"{name} did not compute a small network within {NUMERICS_S:.0f} s", mend, name)
    return judge(name, output, errors, status, mend, before)


def judge(name: str, output: bytes, errors: bytes, status: int, mend: str, before: NumericsId = UNKNOWN) -> CheckResult:
    """Judge what the process of `meshd.doctor.numerics` printed. `before`: the id that is stored for this device, if any."""
    try:
        result = msgspec.json.decode((output.splitlines() or [b""])[-1], type=NumericsResult)
    except msgspec.DecodeError:
        why = (errors.decode(errors="replace").strip().splitlines() or [f"its process ended with status {status}"])[-1]
        return wrong("backend", f"{name} does not compute: {why}", mend, name)
    if not result.right:
        found = f"{name} computes wrong numbers: tokens {_list(result.tokens)} instead of {_list(result.expected)}"
        return wrong("backend", f"{found}, relative error {result.error:.2g}", mend, name)
    if before and before != result.numerics:
        found = f"{name} computes other bits than when this device was measured: {result.numerics}, not {before}"
        return wrong("backend", f"{found}; other peers plan with the stored id", "meshd bench", name)
    return ok(
        "backend",
        f"computes the reference's {len(result.tokens)} tokens (error {result.error:.1g}, in {result.seconds:.2f} s); "
        f"numerics {result.numerics}",
        name,
    )


def _list(tokens: tuple[int, ...]) -> str:
    return ",".join(map(str, tokens))


def _stored(context: Context, names: tuple[str, ...]) -> ProbeRecord | None:
    """Load the stored measurement of this device with these backends."""
    cores = usable_cores()
    return load_record(context.config.cache, probe_key(cores, context.config.threads or cores, names))


def speed(context: Context) -> Found:
    """Show the stored measurement of this device."""
    config = context.config
    path = config.cache / CACHE_FILE
    try:
        if path.exists():
            msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError:
        return [warning("speed", f"{path} is torn, so this device will be measured again", "meshd bench")]
    record = _stored(context, available_backends() if config.backend == _AUTO else (config.wanted_backend,))
    if record is None:
        return [ok("speed", "not measured yet: the first `meshd up` or `meshd bench` does it")]
    failed = [
        warning("speed", f"{trial.backend} could not be measured: {trial.error}", "meshd bench", trial.backend)
        for trial in record.trials
        if trial.error
    ]
    measured = [
        ok("speed", f"decode {rate(trial.rates.decode_bytes_s)}, prefill {flops(trial.rates.prefill_flops_s)}", trial.backend)
        for trial in record.trials
        if trial.rates is not None
    ]
    return [*failed, *measured]
