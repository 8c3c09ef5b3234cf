"""Computes the model of a GGUF file with `transformers` in float32, on weights that the `gguf` package dequantises.

The only code of meshd in it is the reader of the file, so that meshd's computations can be compared with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.initialization import no_init_weights

from meshd.models.files.gguf import GgufFile

F32 = npt.NDArray[np.float32]


class Original:
    """The model of a GGUF file, as a `transformers` model."""

    def __init__(self, file: GgufFile) -> None:
        """Raises: KeyError for an architecture that is not in `_CONFIGS`."""
        architecture = str(file.metadata["general.architecture"])
        config = _CONFIGS[architecture](_Keys(file.metadata, architecture), file)
        with no_init_weights():  # saves the time to draw random weights first
            self._model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        weights = {}
        for name in self._model.state_dict():
            stored = f"{names.get_name(name.removesuffix('.weight'))}.weight"
            if stored in file or name != "lm_head.weight":
                weights[name] = torch.from_numpy(_as_made(architecture, stored, dense(file, stored), config))
        self._model.load_state_dict(weights, strict=False, assign=True)
        self._model.tie_weights()
        self._model.eval()

    def rows(self, ids: Sequence[int], at_once: int) -> Iterator[F32]:
        """Yield the logits after each token of a text, in parts of `[at_once, vocab]` to save memory."""
        with torch.inference_mode():
            hidden = self._model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            for part in hidden.split(at_once):
                yield self._model.lm_head(part).numpy()


def dense(file: GgufFile, name: str) -> F32:
    """Return a tensor as float32, dequantised by the `gguf` package and not by meshd."""
    tensor = file.tensor(name)
    raw = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
    if tensor.kind == "F32":
        return raw.view(np.float32)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.kind])


class _Keys:
    """Reads the metadata of an architecture by keys without its prefix. A missing key without a default is an error."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._prefix = metadata, architecture

    def __call__(self, key: str, default: float | None = None) -> Any:
        value = self._metadata.get(f"{self._prefix}.{key}", default)
        assert value is not None, key
        return value


def _common(keys: _Keys, file: GgufFile) -> dict[str, Any]:
    hidden, heads = keys("embedding_length"), keys("attention.head_count")
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys("feed_forward_length"),
        "num_hidden_layers": keys("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys("attention.head_count_kv", heads),
        "head_dim": keys("attention.key_length", hidden // heads),
        "max_position_embeddings": keys("context_length"),
        "rms_norm_eps": keys("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file,
        "attn_implementation": "sdpa",
    }


def _llama(keys: _Keys, file: GgufFile) -> transformers.PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": keys("rope.freq_base", 10000.0)}
    return transformers.LlamaConfig(**_common(keys, file), rope_parameters=rope)


def _gemma3(keys: _Keys, file: GgufFile) -> transformers.PreTrainedConfig:
    """Files may omit what all Gemma 3 models share: which layers have a window, and the RoPE base of these layers."""
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": keys("rope.freq_base", 1e6)},
        "sliding_attention": {"rope_type": "default", "rope_theta": keys("rope.freq_base_swa", 1e4)},
    }
    common = _common(keys, file)
    return transformers.Gemma3TextConfig(
        **common,
        rope_parameters=rope,
        sliding_window=keys("attention.sliding_window"),
        query_pre_attn_scalar=common["head_dim"],  # the 27B model has another value
    )


_CONFIGS = {"llama": _llama, "gemma3": _gemma3}


def _as_made(architecture: str, name: str, values: F32, config: transformers.PreTrainedConfig) -> F32:
    """Undo how the conversion to GGUF changed a weight: it permutes the rows of Llama's Q and K, and adds 1 to Gemma's norms."""
    part = name.split(".")[-2]
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        pairs = values.reshape(heads, -1, 2, values.shape[1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    if architecture == "gemma3" and part.endswith("norm"):
        return values - 1
    return values.copy() if values.base is not None else values
