"""Folders and split files become one GGUF file, which the `gguf` package and meshd's own reader read back."""

import asyncio
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from meshd.errors import ModelFileError, StorageError
from meshd.models.cards import card_from_gguf
from meshd.models.files.gguf import GgufFile
from meshd.models.files.gguf_writer import GgufWriter, OutTensor
from meshd.models.importing.import_model import import_to
from meshd.models.importing.plan import TENSOR_CHUNK_BYTES
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store
from meshd.types import ModelId, SamplingDefaults
from tiny.gguf_file import write_gguf as write_with_library
from tiny.hf_folders import CONFIG, FFN, HEADS, HIDDEN, KV_HEADS, VOCAB, save, weights, write_folder


def imported(path: Path, target: Path, quant: str | None = None) -> str:
    return import_to(target, path, quant, lambda _: None, lambda _: None)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of Q or K as llama.cpp's converter does."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def expected(dtype: str) -> dict[str, np.ndarray]:
    """The imported tensors: GGUF's name -> values in float32."""
    made = weights(dtype)
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.{layer}.{old}": f"blk.{layer}.{new}" for layer in range(2) for old, new in parts.items()}
    found = {}
    for old, new in names.items():
        value = made[f"{old}.weight"]
        if dtype == "BF16":
            value = (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(new.rpartition(".")[2])
        found[f"{new}.weight"] = (interleaved(value, heads) if heads else value).astype(np.float32)
    return found


def read_back(path: Path) -> tuple[gguf.GGUFReader, dict[str, tuple[str, np.ndarray]]]:
    """Read a file with the `gguf` package. Returns: its reader, and name -> (kind, values)."""
    reader = gguf.GGUFReader(path)
    return reader, {
        tensor.name: (tensor.tensor_type.name, np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }


@pytest.mark.parametrize(("dtype", "shards"), [("F32", 1), ("F16", 3), ("BF16", 2)])
def test_a_folder_becomes_a_file_that_other_tools_can_read(tmp_path: Path, dtype: str, shards: int) -> None:
    folder, target = write_folder(tmp_path / "hf", dtype=dtype, shards=shards), tmp_path / "made.gguf"
    imported(folder, target)
    reader, tensors = read_back(target)
    wanted = expected(dtype)
    assert tensors.keys() == wanted.keys()
    for name, (kind, values) in tensors.items():
        assert kind == (dtype if wanted[name].ndim == 2 else "F32")
        np.testing.assert_array_equal(values.reshape(wanted[name].shape), wanted[name])
    tokenizer = reader.get_field("tokenizer.huggingface.json").contents()
    assert json.loads(tokenizer) == json.loads((folder / "tokenizer.json").read_text())
    assert tokenizers.Tokenizer.from_str(tokenizer).encode("AB").tokens == ["A", "B"]
    assert reader.get_field("llama.rope.freq_base").contents() == 10000.0
    with GgufFile.open(target) as file:
        text = {key: file.metadata[key] for key in file.metadata if "token" in key and "json" not in key}
        card = card_from_gguf(file, name="x", ref="x", model_id=ModelId("0" * 32))
    assert text == {
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 3,
        "meshd.eos_token_ids": (2, 3), "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert card.sampling == SamplingDefaults(temperature=float(np.float32(0.6)), top_k=20)
    assert (card.spec.hidden, card.spec.ffn, card.spec.vocab, card.end_of_sequence) == (HIDDEN, FFN, VOCAB, (2, 3))


@pytest.mark.parametrize(("quant", "kind", "error"), [("q8", "Q8_0", 0.01), ("q4", "Q4_1", 0.09)])
def test_a_folder_is_quantised_at_import(tmp_path: Path, quant: str, kind: str, error: float) -> None:
    imported(write_folder(tmp_path / "hf", dtype="BF16"), tmp_path / "made.gguf", quant)
    reader, tensors = read_back(tmp_path / "made.gguf")
    for name, wanted in expected("BF16").items():
        found, values = tensors[name]
        fine = name in ("token_embd.weight", "output.weight")
        assert found == ("F32" if wanted.ndim == 1 else "Q8_0" if fine else kind)
        assert np.linalg.norm(values - wanted) <= (0.0 if wanted.ndim == 1 else error) * np.linalg.norm(wanted)
    assert reader.get_field("general.quantization_version").contents() == 2


def test_the_same_folder_at_another_path_is_the_same_model(tmp_path: Path) -> None:
    ids = [imported(write_folder(tmp_path / name), tmp_path / f"{name}.gguf") for name in ("one", "two")]
    assert ids[0] == ids[1]
    assert imported(tmp_path / "one", tmp_path / "three.gguf", "q8") != ids[0]


def _nan(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        made = weights()
        made[name].reshape(-1)[-1] = np.nan
        save(folder / "model.safetensors", made)

    return change


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: save(folder / "model.safetensors", {key: value for key, value in weights().items() if key != name})


def _configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | changes)) and None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_nan("model.layers.1.mlp.down_proj.weight"), r"tensor blk\.1\.ffn_down\.weight .*no finite number"),
        (_nan("model.norm.weight"), r"tensor output_norm\.weight .*no finite number"),
        (lambda folder: save(folder / "model.safetensors", weights() | {"odd": np.zeros(3, np.float32)}), "'odd' has no place"),
        (
            lambda folder: save(folder / "model.safetensors", weights() | {"lm_head.weight": np.zeros((4, 4), np.int64)}),
            r"tensor 'lm_head.weight' can't be used: its type I64",
        ),
        (_configured(model_type="mamba"), "'mamba' is not among"),
        (_configured(num_attention_heads=5), "rope_interleave:5"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "nested too deep"),
        (lambda folder: (folder / "config.json").write_text('{"a": 1, "a": 2}'), "'a' appears twice"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json can't be used"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"), "only a tokenizer.model"),
        (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), "not UTF-8"),
    ],
)
def test_a_folder_that_can_not_be_imported_is_an_error_and_leaves_no_file(
    tmp_path: Path, change: Callable[[Path], None], why: str
) -> None:
    folder = write_folder(tmp_path / "hf")
    change(folder)
    with pytest.raises(ModelFileError, match=why):
        imported(folder, tmp_path / "made.gguf")
    assert not (tmp_path / "made.gguf").exists()


def test_an_import_holds_a_chunk_of_a_tensor_not_the_whole_tensor(tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 1 << 17}
    folder = write_folder(tmp_path / "hf", config=config)
    large = np.zeros((1 << 17, HIDDEN), np.float32)  # 32 MiB
    save(folder / "model.safetensors", weights() | {"model.embed_tokens.weight": large, "lm_head.weight": large})
    del large
    tracemalloc.start()
    try:
        imported(folder, tmp_path / "made.gguf", "q4")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 16 * TENSOR_CHUNK_BYTES


def _gpt_oss(folder: Path, experts: int = 3) -> dict[str, np.ndarray]:
    """Write a folder of one layer with experts in MXFP4. Returns: the experts' weights by GGUF's names."""
    rng = np.random.default_rng(2)
    hidden, ffn = 64, 32
    config = CONFIG | {
        "model_type": "gpt_oss", "num_hidden_layers": 1, "num_local_experts": experts, "num_experts_per_tok": 2,
        "sliding_window": 8, "hidden_act": "silu", "intermediate_size": ffn,
    }  # fmt: skip
    write_folder(folder, config=config)
    tensors = {name: value for name, value in weights().items() if "mlp" not in name and "layers.1" not in name}
    tensors |= {"model.layers.0.mlp.router.weight": np.ones((experts, hidden), np.float32)}
    values = {}
    for part, rows, columns in (("gate_up_proj", 2 * ffn, hidden), ("down_proj", hidden, ffn)):
        nibbles = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 128, (experts, rows, columns // 32), dtype=np.uint8)
        tensors |= {f"model.layers.0.mlp.experts.{part}_blocks": nibbles, f"model.layers.0.mlp.experts.{part}_scales": scales}
        codes = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(experts, rows, columns // 32, 32)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        signed = np.where(codes & 8, -table[codes & 7], table[codes & 7])
        values[part] = np.ldexp(signed, scales[..., None].astype(np.int32) - 127).reshape(experts, rows, columns)
    save(folder / "model.safetensors", tensors)
    gate_up = values["gate_up_proj"]
    return {"ffn_gate_exps": gate_up[:, 0::2], "ffn_up_exps": gate_up[:, 1::2], "ffn_down_exps": values["down_proj"]}


@pytest.mark.parametrize("quant", [None, "q4"])
def test_experts_in_mxfp4_are_copied_unchanged(tmp_path: Path, quant: str | None) -> None:
    wanted = _gpt_oss(tmp_path / "hf")
    imported(tmp_path / "hf", tmp_path / "made.gguf", quant)
    _, tensors = read_back(tmp_path / "made.gguf")
    for name, values in wanted.items():
        kind, found = tensors[f"blk.0.{name}.weight"]
        assert kind == "MXFP4"
        np.testing.assert_array_equal(found.reshape(values.shape), values)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda made: made.update({"down_proj_scales": np.full((3, 64, 1), 255, np.uint8)}), r"ffn_down_exps\..* scale is no"),
        (lambda made: made.update({"down_proj_scales": np.zeros((3, 64), np.uint8)}), r"down_proj_blocks' .*\(3, 64, 1, 16\)"),
        (lambda made: made.update({"down_proj_scales": np.zeros((3, 64, 1), np.int8)}), "down_proj_scales'.* missing or no U8"),
        (lambda made: made.pop("down_proj_scales"), "down_proj_scales'.* missing or no U8"),
        (lambda made: made.update({"down_proj_blocks": np.zeros((3, 16), np.uint8)}), "down_proj_blocks' has no place"),
        (lambda made: made.update({"gate_up_proj": np.zeros(8, np.float32)}), "gate_up_proj' has no place"),
    ],
)
def test_mxfp4_that_does_not_fit_is_an_error(tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], why: str) -> None:
    _gpt_oss(tmp_path / "hf")
    prefix = "model.layers.0.mlp.experts."
    made = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    experts = {name.removeprefix(prefix): made.pop(name) for name in list(made) if name.startswith(prefix)}
    change(experts)
    save(tmp_path / "hf" / "model.safetensors", made | {prefix + name: value for name, value in experts.items()})
    with pytest.raises(ModelFileError, match=why):
        imported(tmp_path / "hf", tmp_path / "made.gguf")


def split(whole: Path, folder: Path, count: int) -> Path:
    """Split a file as llama.cpp's gguf-split does. Returns: the first part."""
    with GgufFile.open(whole) as file:
        names = list(file.tensors)
        for number in range(count):
            metadata = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
            metadata |= dict(file.metadata) if number == 0 else {}
            tensors = [
                OutTensor(name, file.tensors[name].kind, file.tensors[name].shape, lambda name=name: [file.tensor(name).data])
                for name in names[number * len(names) // count : (number + 1) * len(names) // count]
            ]
            with (folder / f"m-{number + 1:05}-of-{count:05}.gguf").open("wb") as out:
                GgufWriter(metadata, tensors, "part").write(out, lambda _: None)
    return folder / f"m-00001-of-{count:05}.gguf"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_library(tmp_path_factory.mktemp("whole") / "whole.gguf", layers=2)


def test_a_split_file_is_joined_to_the_original(tmp_path: Path, whole: Path) -> None:
    first = split(whole, tmp_path, 3)
    for part in (first, first.with_name("m-00003-of-00003.gguf")):
        imported(part, tmp_path / "made.gguf")
        with GgufFile.open(tmp_path / "made.gguf") as made, GgufFile.open(whole) as original:
            assert dict(made.metadata) == dict(original.metadata)
            assert list(made.tensors) == list(original.tensors)
            for name in original.tensors:
                assert made.tensor(name).data == original.tensor(name).data
    imported(whole, tmp_path / "small.gguf", "q8")
    with GgufFile.open(tmp_path / "small.gguf") as small:
        assert {info.kind for info in small.tensors.values() if len(info.shape) == 2} == {"Q8_0"}


def test_parts_that_do_not_belong_together_are_an_error(tmp_path: Path, whole: Path) -> None:
    first = split(whole, tmp_path, 3)
    second, third = (first.with_name(f"m-0000{part}-of-00003.gguf") for part in (2, 3))
    saved = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00003\.gguf can't be used: this part of the model is missing"):
        imported(first, tmp_path / "made.gguf")
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelFileError, match="doesn't say that it is part 2 of 3"):
        imported(first, tmp_path / "made.gguf")
    second.write_bytes(saved[: len(saved) // 2])
    with pytest.raises(ModelFileError, match=r"00002-of-00003\.gguf .*tensor"):
        imported(first, tmp_path / "made.gguf")
    with pytest.raises(ModelFileError, match="part 00004 of 00003"):
        imported(tmp_path / "m-00004-of-00003.gguf", tmp_path / "made.gguf")
    assert not (tmp_path / "made.gguf").exists()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models", tmp_path / "cache")


async def test_a_folder_is_pulled_found_and_removed(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    steps: list[PullProgress] = []
    plain = await store.pull(f"file:{folder}", steps.append)
    importing = [step for step in steps if step.phase is PullPhase.IMPORTING]
    assert importing[0].total_bytes
    assert importing[-1].done_bytes >= importing[0].total_bytes
    small = await store.pull(f"file:{folder}+q4")
    assert (plain.name, small.name) == (f"file:{folder}", f"file:{folder}+q4")
    assert (plain.in_place, plain.path.parent) == (False, tmp_path / "models")
    assert small.size_bytes < plain.size_bytes
    assert store.list() == [plain, small]
    assert await store.pull(f"file:{folder}") == plain
    with store.open(plain) as file:
        assert "token_embd.weight" in file
    assert store.remove(plain.name) == plain.size_bytes
    assert store.list() == [small]
    assert (folder / "model.safetensors").exists()


async def test_a_changed_folder_is_imported_again(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    first = await store.pull(f"file:{folder}")
    write_folder(folder, seed=1)
    second = await store.pull(f"file:{folder}")
    assert first.id != second.id
    assert store.list() == [second]
    assert [path.name for path in (tmp_path / "models").glob("*.gguf")] == [second.path.name]
    second.path.unlink()
    assert (await store.pull(f"file:{folder}")).id == second.id


async def test_a_cancelled_import_and_a_full_disk_leave_no_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "hf")
    began = asyncio.Event()

    def report(step: PullProgress) -> None:
        if step.phase is PullPhase.IMPORTING:
            began.set()

    pull = asyncio.create_task(store.pull(f"file:{folder}", report))
    await began.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(StorageError, match="too little room"):
        await store.pull(f"file:{folder}")
    assert list((tmp_path / "models").rglob("*.gguf")) == []


FULL = """
import asyncio, resource, sys
from pathlib import Path
from meshd.errors import MeshdError
from meshd.models.store.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    asyncio.run(Store(Path(sys.argv[1])).pull("file:" + sys.argv[2]))
except MeshdError as error:
    print(error.code, error)
"""


def test_a_disk_that_fills_up_is_an_error_and_leaves_no_file(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    command = [sys.executable, "-c", FULL, str(tmp_path / "models"), str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed.startswith("storage_error ")
    assert "model.gguf can't be written" in printed
    assert list((tmp_path / "models").rglob("*.gguf")) == []
    assert store.list() == []


async def test_the_remains_of_a_killed_import_are_removed_or_replaced(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    model = await store.pull(f"file:{folder}")
    (partial,) = (tmp_path / "models" / "partial").iterdir()
    (partial / "model.gguf").write_bytes(b"half")
    assert store.remove(f"file:{folder}") == model.size_bytes + 4
    (partial / "model.gguf").write_bytes(b"half")
    assert (await store.pull(f"file:{folder}")).id == model.id
    assert [path.name for path in partial.iterdir() if path.name != "lock"] == []


async def test_a_split_file_is_pulled_by_any_of_its_parts(store: Store, tmp_path: Path, whole: Path) -> None:
    first = split(whole, tmp_path, 2)
    model = await store.pull(f"file:{first}")
    assert not model.in_place
    with store.open(model) as file, GgufFile.open(whole) as original:
        assert list(file.tensors) == list(original.tensors)
