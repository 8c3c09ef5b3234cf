"""Manifests: layout, offers on the wire, hostile offers, and the tensors that a stage needs."""

import hashlib
import random
from pathlib import Path

import msgspec
import pytest

from meshd.errors import ModelFileError
from meshd.kernels.registry import make_backend
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import (
    HEADER,
    Manifest,
    Offer,
    Part,
    check_layout,
    decode_offer,
    encode_offer,
    layout_of,
    tensors_of,
)
from meshd.types import LayerRange, Tensor
from tiny.copies import manifest_of
from tiny.llama import TinyLlama, tiny_spec


def test_the_parts_cover_the_file_from_its_first_byte_to_its_last(source: Path) -> None:
    manifest = manifest_of(source)
    content = source.read_bytes()
    assert manifest.size == len(content)
    assert b"".join(content[part.offset : part.end] for part in manifest.parts) == content
    assert all(hashlib.sha256(content[part.offset : part.end]).digest() == part.sha256 for part in manifest.parts)
    with GgufFile.open(source) as file:
        assert [part.name for part in manifest.parts] == [HEADER, *file.tensors]
        check_layout(manifest, file.tensors)


def test_an_offer_arrives_as_it_was_sent(source: Path) -> None:
    for have in (None, (0, 3)):
        offer = Offer(manifest_of(source), have)
        arrived = decode_offer(encode_offer(offer))
        assert arrived == offer
        assert arrived.manifest.digest == offer.manifest.digest


def part(name: str, offset: int, length: int, sha256: bytes = bytes(32)) -> Part:
    return Part(name, offset, length, sha256)


HOSTILE = {
    "nothing": Offer(Manifest(())),
    "no tensor": Offer(Manifest((part("", 0, 10),))),
    "no header": Offer(Manifest((part("a", 0, 10), part("b", 10, 10)))),
    "a gap": Offer(Manifest((part("", 0, 10), part("a", 11, 10)))),
    "an overlap": Offer(Manifest((part("", 0, 10), part("a", 9, 10)))),
    "not in order": Offer(Manifest((part("", 0, 10), part("a", 20, 10), part("b", 10, 10)))),
    "a negative offset": Offer(Manifest((part("", -10, 20), part("a", 10, 10)))),
    "an empty part": Offer(Manifest((part("", 0, 10), part("a", 10, 0)))),
    "a part of an absurd size": Offer(Manifest((part("", 0, 10), part("a", 10, 1 << 60)))),
    "a file of an absurd size": Offer(Manifest((part("", 0, 10), part("a", 10, 1 << 43), part("b", 10 + (1 << 43), 1 << 43)))),
    "an endless header": Offer(Manifest((part("", 0, 1 << 40), part("a", 1 << 40, 10)))),
    "a name twice": Offer(Manifest((part("", 0, 10), part("a", 10, 10), part("a", 20, 10)))),
    "a long name": Offer(Manifest((part("", 0, 10), part("a" * 129, 10, 10)))),
    "a short hash": Offer(Manifest((part("", 0, 10), part("a", 10, 10, b"abc")))),
    "parts that it does not name": Offer(Manifest((part("", 0, 10), part("a", 10, 10))), (0, 2)),
    "parts before the first": Offer(Manifest((part("", 0, 10), part("a", 10, 10))), (-1,)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_offer_is_a_model_file_error(what: str) -> None:
    with pytest.raises(ModelFileError, match="list of tensors"):
        decode_offer(encode_offer(HOSTILE[what]))


def test_random_bytes_are_a_model_file_error() -> None:
    rng = random.Random(5)
    whole = encode_offer(HOSTILE["a name twice"])
    for data in (b"", b"\xdf\xff\xff\xff\xff", whole[:-3], *(rng.randbytes(rng.randrange(1, 60)) for _ in range(200))):
        with pytest.raises(ModelFileError):
            decode_offer(data)
    with pytest.raises(ModelFileError, match="longer than"):
        decode_offer(bytes(9 << 20))


def test_too_many_tensors_are_refused() -> None:
    parts = tuple(part(str(index), index, 1) for index in range((1 << 16) + 2))
    with pytest.raises(ModelFileError):
        decode_offer(encode_offer(Offer(Manifest(parts))))


def test_a_manifest_that_does_not_match_the_header_is_refused(source: Path) -> None:
    manifest = manifest_of(source)
    first, second, *rest = manifest.parts
    swapped = Manifest((first, msgspec.structs.replace(second, name=rest[0].name), *rest))
    moved = Manifest((first, msgspec.structs.replace(second, length=second.length + 4), *rest))
    with GgufFile.open(source) as file:
        for other in (swapped, moved):
            with pytest.raises(ModelFileError, match="does not match the model's header"):
                check_layout(other, file.tensors)


def test_a_file_with_many_bytes_outside_its_tensors_is_not_shared(source: Path) -> None:
    with GgufFile.open(source) as file, pytest.raises(ModelFileError, match="belong to nothing"):
        layout_of(file.tensors, source.stat().st_size + (1 << 17))


class Recorder:
    """A weight source that records the tensors read from it."""

    def __init__(self, weights: TinyLlama) -> None:
        self.weights = weights
        self.asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def tensor(self, name: str) -> Tensor:
        self.asked.add(name)
        return self.weights.tensor(name)


def names_of(weights: TinyLlama) -> list[str]:
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{layer}.{name}.weight" for layer in range(weights.spec.layers) for name in parts]
    names += ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"]
    return [name for name in names if name in weights]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("start", "end"), [(0, 12), (0, 1), (1, 2), (10, 12), (1, 11)])
def test_the_selected_tensors_are_exactly_those_that_backends_read(backend: str, tied: bool, start: int, end: int) -> None:
    spec = tiny_spec(layers=12, tied=tied)
    recorder = Recorder(TinyLlama(spec))
    ends: dict[str, bool] = {"embedding": start == 0, "head": end == spec.layers}
    loaded = make_backend(backend, 1).load(spec, LayerRange(start, end), recorder, **ends)
    for inner in {LayerRange(start, end), LayerRange(start, start + 1), LayerRange(end - 1, end)}:
        loaded.stage(inner)
    assert tensors_of(spec, LayerRange(start, end), names=names_of(recorder.weights), **ends) == recorder.asked
    loaded.close()


def test_every_stage_needs_the_rotation_factors() -> None:
    names = ["rope_freqs.weight", "blk.2.attn_q.weight"]
    assert tensors_of(tiny_spec(), LayerRange(1, 2), embedding=False, head=False, names=names) == {"rope_freqs.weight"}
