"""Model cards: what the planner needs to know about a model, read from the header of its file."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath

import msgspec

from meshd.bounds import printable
from meshd.errors import ModelFileError
from meshd.models.architectures import prediction_layers, spec_from_metadata
from meshd.models.files.gguf import GgufFile, MetadataValue, TensorInfo
from meshd.models.files.gguf_header import uncomputed
from meshd.models.sampling import sampling_from_gguf
from meshd.models.text.tokenizer.document import huggingface_json
from meshd.models.text.tokenizer.gguf_keys import TokenizerKeys
from meshd.tensors import EXPERT_PROJECTIONS, KINDS, ROPE_FACTORS, UNUSED, border_shapes, layer_shapes, rope_shape
from meshd.types import ModelCard, ModelId, ModelSpec

END_OF_ANSWER = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<|return|>"}
)
"""Control tokens that end an answer in one of the model families, even if a file's metadata does not list them."""
_CHANNELS = frozenset({"<|channel|>", "<|message|>", "<|call|>", "<|end|>"})
"""Control tokens of gpt-oss, whose answers are several messages: each ends with `<|end|>`, the last one otherwise."""
_END_OF_CHANNELS = END_OF_ANSWER - {"<|end|>"} | {"<|call|>"}
EOS_TOKEN_IDS = "meshd.eos_token_ids"
"""meshd's own metadata key: all tokens that end an answer. GGUF has keys for only three such tokens."""
LEFT_OUT = "meshd.import.left_out"
"""meshd's own metadata key: number of tensors that an import left out because they predict several tokens ahead."""
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
CONTROL_TOKEN = 3
"""The value of GGUF's `tokenizer.ggml.token_type` for control tokens."""
_UNSUPPORTED_HINT = "meshd can't run this model yet; README says which it can"


def shown_to_peers(card: ModelCard) -> ModelCard:
    """Returns: the card without the path of the owner's file: the file's own name stands for it."""
    if not card.ref.startswith("file:"):
        return card
    name = PurePath(card.name).name if card.name.startswith("file:") else card.name
    return msgspec.structs.replace(card, name=name, ref="")


def card_from_gguf(file: GgufFile, *, name: str, ref: str, model_id: ModelId, created: int = 0) -> ModelCard:
    """Read a model's card. `file` may be a header without the weights. `created` is in seconds since the epoch.

    Raises: ModelFileError if the architecture is unknown, or if the tensors are not the ones that the metadata implies.
    """
    spec = spec_from_metadata(file.name, file.metadata, file.tensors)
    _check_tensors(file, spec)
    layers = [{part: file.tensors[f"blk.{layer}.{part}"] for part in layer_shapes(spec)} for layer in range(spec.layers)]
    head = _head_tensors(file)
    weights = [_weights(layer.values()) for layer in layers]
    card = ModelCard(
        id=model_id,
        name=name,
        ref=ref,
        quantisation=_quantisation(info for layer in layers for info in layer.values()),
        spec=spec,
        layer_bytes=tuple(_bytes(layer.values()) for layer in layers),
        embedding_bytes=file.tensors["token_embd.weight"].nbytes,
        head_bytes=_bytes(head),
        layer_parameters=tuple(_used_parameters(layer, spec) for layer in layers),
        head_parameters=_parameters(head),
        end_of_sequence=end_of_sequence(file.metadata),
        created=created,
        layer_weights={kind: tuple(counts[kind] for counts in weights) for kind in sorted(set().union(*weights))},
        head_weights=dict(_weights(head)),
        sampling=sampling_from_gguf(file.metadata),
    )
    _check_bounds(file.name, card)
    return card


def end_of_sequence(metadata: Mapping[str, MetadataValue]) -> tuple[int, ...]:
    """Find the ids of the tokens that end an answer, in ascending order.

    Raises: ModelFileError if the file has a `tokenizer.json` that can't be read.
    """
    keys = TokenizerKeys(metadata)
    found = {value for key in _END_KEYS[1:] if isinstance(value := metadata.get(f"tokenizer.ggml.{key}"), int)}
    if isinstance(listed := metadata.get(EOS_TOKEN_IDS), tuple):
        found.update(id_ for id_ in listed if isinstance(id_, int))
    if (document := huggingface_json(metadata)) is not None:
        if isinstance(eos := keys.get(_END_KEYS[0]), int):
            found.add(eos)
        control = {token.content: token.id for token in document.added if token.special}
        return tuple(sorted(found.union(_ending(control))))
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    if isinstance(tokens, tuple) and isinstance(types, tuple):
        pairs = enumerate(zip(tokens, types, strict=False))
        found.update(_ending({str(token): index for index, (token, kind) in pairs if kind == CONTROL_TOKEN}))
        found = {id_ for id_ in found if 0 <= id_ < len(tokens)} if tokens else found
        if tokens and (eos := keys.special(_END_KEYS[0], types or (CONTROL_TOKEN,) * len(tokens))) is not None:
            found.add(eos)
    return tuple(sorted(found))


def _ending(control: Mapping[str, int]) -> set[int]:
    """Return the ids of the control tokens that end an answer in models with such a vocabulary."""
    names = _END_OF_CHANNELS if control.keys() >= _CHANNELS else END_OF_ANSWER
    return {id_ for token, id_ in control.items() if token in names}


def _check_tensors(file: GgufFile, spec: ModelSpec) -> None:
    """Check that the file has exactly the tensors of its architecture: if an extra bias were ignored, answers would be wrong."""
    if spec.layers > len(file.tensors):
        raise ModelFileError(f"{file.name} can't be run: it has {len(file.tensors)} tensors for {spec.layers} layers")
    expected = border_shapes(spec)
    for layer in range(spec.layers):
        expected |= {f"blk.{layer}.{part}": shape for part, shape in layer_shapes(spec).items()}
    factors = [name for name in ROPE_FACTORS if name in file.tensors]
    expected |= dict.fromkeys(factors[:1], rope_shape(spec))
    if odd := sorted(expected.keys() ^ (file.tensors.keys() - set(UNUSED) - set(prediction_tensors(file)))):
        problem = "is missing" if odd[0] in expected else "has no place in this architecture"
        raise ModelFileError(f"{file.name} can't be run: tensor {odd[0]} {problem}", hint=_UNSUPPORTED_HINT)
    for name, shape in expected.items():
        if file.tensors[name].shape != shape:
            raise ModelFileError(f"{file.name} can't be run: tensor {name} has shape {file.tensors[name].shape}, not {shape}")
        if file.tensors[name].kind not in KINDS:
            raise uncomputed(file.name, name, file.tensors[name].kind)


def prediction_tensors(file: GgufFile) -> list[str]:
    """List the tensors of the layers that predict several tokens ahead (MTP). meshd computes the network without them."""
    layers = tuple(f"blk.{layer}." for layer in prediction_layers(file.tensors))
    return [name for name in file.tensors if layers and name.startswith(layers)]


def _check_bounds(name: str, card: ModelCard) -> None:
    """Check that other peers accept the card: it has the bounds of what peers send. Raises: ModelFileError."""
    try:
        msgspec.convert(msgspec.to_builtins(card), ModelCard)
    except msgspec.ValidationError as error:
        raise ModelFileError(f"{printable(name)} can't be run: its header is out of bounds: {error}") from None


def _head_tensors(file: GgufFile) -> list[TensorInfo]:
    output = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
    return [file.tensors["output_norm.weight"], output]


def _quantisation(tensors: Iterable[TensorInfo]) -> str:
    """Return the GGUF kind, such as `Q4_K`, that takes the most bytes of these tensors."""
    sizes: Counter[str] = Counter()
    for info in tensors:
        sizes[info.kind] += info.nbytes
    return sizes.most_common(1)[0][0]


def _bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors)


def _weights(tensors: Iterable[TensorInfo]) -> Counter[str]:
    """Count weights by kind."""
    counts: Counter[str] = Counter()
    for info in tensors:
        counts[info.kind] += math.prod(info.shape)
    return counts


def _used_parameters(layer: Mapping[str, TensorInfo], spec: ModelSpec) -> int:
    """Count the weights of a layer that one token uses: of the experts, only those that the router chooses."""
    experts = [info for part, info in layer.items() if part.partition(".")[0] in EXPERT_PROJECTIONS]
    dense = _parameters(layer.values()) - _parameters(experts)
    return dense + _parameters(experts) * spec.experts_used // spec.experts if spec.experts else dense


def _parameters(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors)
