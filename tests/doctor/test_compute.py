"""Backends: right numbers, wrong numbers, and a process that does not end well; the stored measurement."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from meshd.agents.cluster_service import CheckResult
from meshd.doctor.check import Context
from meshd.doctor.compute import NumericsResult, backends, judge, speed
from meshd.numerics import NumericsId

NUMERICS = NumericsId("torch/f32/512/0123456789abcdef/varies")
RIGHT = NumericsResult(backend="torch", numerics=NUMERICS, tokens=(1, 2), expected=(1, 2), error=1e-6, seconds=0.1)
MEND = "start `meshd up` with `--backend onnxruntime`"


def _judged(result: NumericsResult) -> CheckResult:
    return judge("torch", msgspec.json.encode(result), b"", 0, MEND)


def test_right_numbers() -> None:
    assert _judged(RIGHT).status.value == "ok"
    assert NUMERICS in _judged(RIGHT).found


def test_other_bits_than_those_that_were_measured_are_wrong_although_the_numbers_are_right() -> None:
    printed = msgspec.json.encode(RIGHT)
    assert judge("torch", printed, b"", 0, MEND, NUMERICS).status.value == "ok"
    result = judge("torch", printed, b"", 0, MEND, NumericsId("torch/f32/512/fedcba9876543210"))
    assert (result.status.value, result.mend) == ("wrong", "meshd bench")
    assert f"{NUMERICS}, not torch/f32/512/fedcba9876543210" in result.found


@pytest.mark.parametrize("change", [{"tokens": (1, 3)}, {"error": 0.5}])
def test_wrong_numbers_are_named_with_another_backend(change: dict[str, object]) -> None:
    result = _judged(msgspec.structs.replace(RIGHT, **change))
    assert result.status.value == "wrong"
    assert "computes wrong numbers" in result.found
    assert result.mend == MEND


def test_a_process_that_crashes_is_named_with_its_last_line() -> None:
    result = judge("torch", b"", b"Traceback\nImportError: libtorch.so: cannot open\n", 1, MEND)
    assert "ImportError: libtorch.so" in result.found
    assert "status -11" in judge("torch", b"", b"", -11, MEND).found


async def test_a_backend_that_is_not_installed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from meshd.doctor import compute

    monkeypatch.setattr(compute, "available_backends", lambda: ("torch",))
    [result] = await backends(replace(context, config=replace(context.config, backend="onnxruntime")))
    assert "--backend torch" in result.mend
    monkeypatch.setattr(compute, "available_backends", tuple)
    [result] = await backends(context)
    assert "pip install" in result.mend


async def test_a_backend_computes_the_reference_in_a_process_of_its_own(context: Context) -> None:
    [result] = await backends(replace(context, config=replace(context.config, backend="onnxruntime")))
    assert (result.status.value, result.subject) == ("ok", "onnxruntime")


def test_a_torn_measurement(context: Context, tmp_path: Path, make_torn: Callable[[Path], None]) -> None:
    assert [result.status.value for result in speed(context)] == ["ok"]
    make_torn(context.config.cache / "probe.json")
    [result] = speed(context)
    assert (result.status.value, result.mend) == ("warning", "meshd bench")


@pytest.fixture
def make_torn() -> Callable[[Path], None]:
    return lambda path: path.write_text('[{"key":') and None
