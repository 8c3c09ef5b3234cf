"""Names and shapes of a network's tensors, in GGUF's terms (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from meshd.types import ModelSpec

Shapes = dict[str, tuple[int, ...]]

KINDS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4",
)  # fmt: skip
"""GGUF's names of the types of tensors, called kinds, that meshd computes with."""

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight")
"""Tensors with divisors of the rotation's frequencies. A file has at most one of them."""
UNUSED = ("rope_factors_long.weight",)
"""Tensors that meshd ignores: divisors for contexts beyond the training length. They would change shorter contexts' answers too."""
BEFORE_ATTENTION = frozenset({"attn_norm", "attn_qkv", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm"})
"""Short names of a layer's tensors that it computes with before its attention."""
EXPERT_PROJECTIONS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def projections(spec: ModelSpec) -> Shapes:
    """Shapes of one layer's matrices by their short names: `[out, in]`, or `[experts, out, in]`."""
    hidden, ffn = spec.hidden, spec.ffn
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: Shapes = {"attn_output": (hidden, queries)}
    if "attn_qkv" in spec.fused:
        shapes["attn_qkv"] = (queries + 2 * keys, hidden)
    else:
        shapes |= {"attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden)}
    if spec.experts:
        wide, narrow = (spec.experts, ffn, hidden), (spec.experts, hidden, ffn)
        return shapes | {"ffn_gate_inp": (spec.experts, hidden)} | dict(zip(EXPERT_PROJECTIONS, (wide, wide, narrow), strict=True))
    if "ffn_up" in spec.fused:
        return shapes | {"ffn_up": (2 * ffn, hidden), "ffn_down": (hidden, ffn)}
    return shapes | {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}


def norm_names(spec: ModelSpec) -> list[str]:
    """List the names of a layer's norms over the hidden state."""
    return ["attn_norm", spec.ffn_norm] * spec.pre_norm + ["post_attention_norm", "post_ffw_norm"] * spec.post_norm


def layer_shapes(spec: ModelSpec) -> Shapes:
    """Shapes of one layer's tensors, by name without `blk.N.`."""
    matrices = projections(spec)
    shapes: Shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}.bias": matrices[name][:-1] for name in spec.biases}
    shapes |= {f"{name}.weight": (spec.hidden,) for name in norm_names(spec)}
    if spec.qk_norm:
        per_head = spec.qk_norm == "head"
        shapes["attn_q_norm.weight"] = (spec.head_dim * (1 if per_head else spec.heads),)
        shapes["attn_k_norm.weight"] = (spec.head_dim * (1 if per_head else spec.kv_heads),)
    if spec.sinks:
        shapes["attn_sinks.weight"] = (spec.heads,)
    return shapes


def border_shapes(spec: ModelSpec) -> Shapes:
    """Shapes of the tensors outside the layers: embedding, final norm, and the head unless it is tied."""
    shapes: Shapes = {"token_embd.weight": (spec.vocab, spec.hidden), "output_norm.weight": (spec.hidden,)}
    return shapes if spec.tied_head else shapes | {"output.weight": (spec.vocab, spec.hidden)}


def rope_shape(spec: ModelSpec) -> tuple[int, ...]:
    """Shape of the tensors in `ROPE_FACTORS`."""
    return ((spec.rope_dim or spec.head_dim) // 2,)


def tensor_shape(spec: ModelSpec, name: str) -> tuple[int, ...]:
    """Look up the shape of a tensor by its full name. Raises: KeyError."""
    if name in ROPE_FACTORS:
        return rope_shape(spec)
    block, _, rest = name.partition(".")
    return layer_shapes(spec)[rest.partition(".")[2]] if block == "blk" else border_shapes(spec)[name]
