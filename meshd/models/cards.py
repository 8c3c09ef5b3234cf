"""What the planner needs to know of a model, from its file's header alone."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from meshd.errors import ModelFileError
from meshd.models.gguf import GgufFile, MetadataValue, TensorInfo
from meshd.models.tokenizer_document import huggingface_json
from meshd.types import ModelCard, ModelId, ModelSpec

ARCHITECTURES = ("llama",)
"""Those that the backends compute."""

_END_OF_ANSWER = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<|return|>"}
)
"""Control tokens that end an answer in one model family or another, whether or not the metadata says so."""
EOS_TOKEN_IDS = "meshd.eos_token_ids"
"""Our own key, where a model has more of them than GGUF has keys for."""
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
CONTROL_TOKEN = 3
"""GGUF's `tokenizer.ggml.token_type` of tokens that are no text."""
_UNSUPPORTED_HINT = "meshd can't run this model yet; try smollm2:135m"


def card_from_gguf(file: GgufFile, *, name: str, ref: str, model_id: ModelId, created: int = 0) -> ModelCard:
    """Read a model's card; its weights are not needed, so `file` may be a header alone.

    Raises: ModelFileError for an architecture that is not known here, and for a file whose tensors are not those that its
    metadata promises.
    """
    spec = _spec(file)
    _check_tensors(file, spec)
    layers = [[file.tensors[f"blk.{layer}.{part}"] for part in _layer_shapes(spec)] for layer in range(spec.layers)]
    head = _head_tensors(file)
    return ModelCard(
        id=model_id,
        name=name,
        ref=ref,
        quantisation=_quantisation(info for layer in layers for info in layer),
        spec=spec,
        layer_bytes=tuple(_bytes(layer) for layer in layers),
        embedding_bytes=file.tensors["token_embd.weight"].nbytes,
        head_bytes=_bytes(head),
        layer_parameters=tuple(_parameters(layer) for layer in layers),
        head_parameters=_parameters(head),
        end_of_sequence=end_of_sequence(file.metadata),
        created=created,
    )


def end_of_sequence(metadata: Mapping[str, MetadataValue]) -> tuple[int, ...]:
    """Token ids that end an answer, in order. Raises: ModelFileError for a `tokenizer.json` that can't be read."""
    found = {value for key in _END_KEYS if isinstance(value := metadata.get(f"tokenizer.ggml.{key}"), int)}
    if isinstance(several := metadata.get(EOS_TOKEN_IDS), tuple):
        found.update(id_ for id_ in several if isinstance(id_, int))
    if (document := huggingface_json(metadata)) is not None:
        return tuple(sorted(found.union(token.id for token in document.added if token.special and token.content in _END_OF_ANSWER)))
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    if isinstance(tokens, tuple) and isinstance(types, tuple):
        pairs = enumerate(zip(tokens, types, strict=False))
        found.update(index for index, (token, kind) in pairs if kind == CONTROL_TOKEN and token in _END_OF_ANSWER)
    return tuple(sorted(found))


def _spec(file: GgufFile) -> ModelSpec:
    keys = _Keys(file)
    architecture = keys.architecture()
    heads = keys.count("attention.head_count")
    hidden = keys.count("embedding_length")
    kv_heads = keys.count("attention.head_count_kv", heads)
    head_dim = keys.count("attention.key_length", hidden // heads)
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("rope.dimension_count", head_dim)
    keys.must_be("rope.scaling.type", "none")
    if heads % kv_heads:
        raise keys.wrong("attention.head_count_kv", f"{heads} heads do not share {kv_heads} evenly")
    return ModelSpec(
        architecture=architecture,
        layers=keys.count("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=keys.count("feed_forward_length"),
        vocab=_vocabulary(file),
        context_length=keys.count("context_length"),
        rope_theta=keys.positive("rope.freq_base", 10000.0),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in file,
    )


class _Keys:
    """An architecture's metadata, checked as it is read."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = ""

    def architecture(self) -> str:
        architecture = self._file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ModelFileError(
                f"{self._file.name} can't be run: its architecture {architecture!r} is not among {', '.join(ARCHITECTURES)}",
                hint=_UNSUPPORTED_HINT,
            )
        self._prefix = f"{architecture}."
        return str(architecture)

    def count(self, key: str, default: int | None = None) -> int:
        value = self._file.metadata.get(self._prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "it is missing" if value is None else f"{value!r} is no positive integer")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._file.metadata.get(self._prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, "it is missing" if value is None else f"{value!r} is no positive number")
        return float(value)

    def must_be(self, key: str, expected: int | str) -> None:
        value = self._file.metadata.get(self._prefix + key, expected)
        if value != expected:
            raise self.wrong(key, f"{value!r} is not {expected!r}, all that can be run yet")

    def wrong(self, key: str, why: str) -> ModelFileError:
        return ModelFileError(f"{self._file.name} can't be run: metadata key {self._prefix + key!r}: {why}", hint=_UNSUPPORTED_HINT)


def _vocabulary(file: GgufFile) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelFileError(f"{file.name} can't be run: it has no embedding table token_embd.weight")
    return table.shape[0]


def _check_tensors(file: GgufFile, spec: ModelSpec) -> None:
    """Exactly the tensors of this architecture: a bias or an expert left out would give wrong answers without a word."""
    if spec.layers > len(file.tensors):
        raise ModelFileError(f"{file.name} can't be run: it has {len(file.tensors)} tensors for {spec.layers} layers")
    expected = _shapes(spec)
    if odd := sorted(expected.keys() ^ file.tensors.keys()):
        problem = "is missing" if odd[0] in expected else "has no place in this architecture here"
        raise ModelFileError(f"{file.name} can't be run: tensor {odd[0]} {problem}", hint=_UNSUPPORTED_HINT)
    for name, shape in expected.items():
        if file.tensors[name].shape != shape:
            raise ModelFileError(f"{file.name} can't be run: tensor {name} has shape {file.tensors[name].shape}, not {shape}")


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shapes = {f"blk.{layer}.{part}": shape for layer in range(spec.layers) for part, shape in _layer_shapes(spec).items()}
    shapes |= {"token_embd.weight": (spec.vocab, spec.hidden), "output_norm.weight": (spec.hidden,)}
    if not spec.tied_head:
        shapes["output.weight"] = (spec.vocab, spec.hidden)
    return shapes


def _layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return {
        "attn_norm.weight": (spec.hidden,),
        "attn_q.weight": (queries, spec.hidden),
        "attn_k.weight": (keys, spec.hidden),
        "attn_v.weight": (keys, spec.hidden),
        "attn_output.weight": (spec.hidden, queries),
        "ffn_norm.weight": (spec.hidden,),
        "ffn_gate.weight": (spec.ffn, spec.hidden),
        "ffn_up.weight": (spec.ffn, spec.hidden),
        "ffn_down.weight": (spec.hidden, spec.ffn),
    }


def _head_tensors(file: GgufFile) -> list[TensorInfo]:
    output = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
    return [file.tensors["output_norm.weight"], output]


def _quantisation(tensors: Iterable[TensorInfo]) -> str:
    """The kind that most bytes of the layers have."""
    sizes: Counter[str] = Counter()
    for info in tensors:
        sizes[info.kind] += info.nbytes
    return sizes.most_common(1)[0][0]


def _bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors)


def _parameters(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors)
