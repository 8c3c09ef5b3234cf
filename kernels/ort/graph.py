"""Builds the subgraphs that the onnxruntime backend runs between two attentions.

A layer has the same operators in the same order wherever a stage begins or ends, and graph optimisation is off. Otherwise
onnxruntime could fuse operators in the middle of a stage that it can't fuse at the stage's end, and the bits would depend on the
split into stages. Operators outside ONNX's own set are documented in onnxruntime's `docs/ContribOperators.md`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from meshd.kernels.weights.kinds import BlockKind
from meshd.kernels.weights.layers import CLAMP, CLAMPED_SLOPE, Expert, NetworkWeights, Projection
from meshd.kernels.weights.load import F32, BlockMatrix, DenseMatrix
from meshd.kernels.weights.matrices import zero_points_and_shifts
from meshd.types import ModelSpec

MS = "com.microsoft"
HEAD_PART_WEIGHTS = 16 << 20
"""Maximum number of weights in one part of the head. Packing takes twice the memory of the part, in addition to the part itself."""
DENSE_COLUMNS = 128
"""Columns of a matrix of 16-bit floats in one `Gemm`. Onnxruntime divides the sums of a product whose weights are not packed, and
for few rows of weights in each thread it takes longer slices than 128. So with wider products, bits depended on the threads."""
ACCURACY_F32, ACCURACY_INT8 = 1, 4
"""`accuracy_level` of MatMulNBits: float32, or activations quantised to int8 with one scale per block. Sums are float32 in both."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How products are computed."""

    level: int
    """ACCURACY_F32 or ACCURACY_INT8."""
    zero_points: bool
    """Whether weights of kinds with minima get a zero point per group, which makes the error of int8 activations smaller."""

    @property
    def packs(self) -> bool:
        """Whether onnxruntime packs codes with their scales and sums. It then keeps the scales alone as well, so that each group
        takes two more float32 (measured with onnxruntime 1.32 on x86-64, as the growth of the process)."""
        return self.level == ACCURACY_INT8

    def bits_of(self, kind: BlockKind) -> float:
        """Return the bits per weight that a quantised kind takes in a session."""
        floats = 3 if self.packs else 1
        zero_point = 0.0
        if kind.minimum is not None:
            floats += 1
            zero_point = kind.bits / kind.group if self.zero_points else 0.0
        return kind.bits + floats * kind.group_bits + zero_point


@dataclass(frozen=True, slots=True)
class Weight:
    """An array that the session reads from memory, not from the graph."""

    value: npt.NDArray[np.generic]
    kind: int
    """ONNX's element type; numpy has no bfloat16."""


@dataclass(frozen=True, slots=True)
class Subgraph:
    """An ONNX model of some operators, and the weights that it refers to."""

    model: ModelProto
    weights: dict[str, Weight]
    packed_bytes: int = 0
    """What packing adds to the weights: see `Precision.packs`."""

    @property
    def bytes(self) -> int:
        """Bytes that a session with this subgraph holds."""
        return self.packed_bytes + sum(weight.value.nbytes for weight in self.weights.values())


@dataclass(slots=True)
class GraphBuilder:
    """Builds a graph. Its methods add operators and return the names of their outputs."""

    precision: Precision
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    packed_bytes: int = 0

    def node(self, operator: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attributes: float) -> str:
        """Add an operator. Without `outputs`, the operator has one output. Returns: the name of the first output."""
        names = outputs or (f"{operator}_{len(self.nodes)}",)
        node = helper.make_node(operator, inputs, names, domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return names[0]

    def constant(self, value: npt.NDArray[np.generic]) -> str:
        """Add a small array to the graph itself."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, value: npt.NDArray[np.generic], kind: int | None = None) -> str:
        """Add an array that stays outside the graph. `kind` is its ONNX type if that differs from numpy's."""
        name = f"weight_{len(self.weights)}"
        weight = Weight(value, kind or helper.np_dtype_to_tensor_dtype(value.dtype))
        tensor = TensorProto(name=name, dims=value.shape, data_type=weight.kind, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=name)
        self.weights[name] = weight
        self.constants.append(tensor)
        return name

    def norm(self, x: str, weight: F32, eps: float) -> str:
        return self.node("SimplifiedLayerNormalization", x, self.constant(weight), epsilon=eps, axis=-1)

    def product(self, x: str, linear: Projection) -> str:
        """Add `x @ w.T + bias`. The results of several matrices are concatenated."""
        parts = [self._block_product(x, m) if isinstance(m, BlockMatrix) else self._dense_product(x, m) for m in linear.matrices]
        y = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=-1)
        return y if linear.bias is None else self.node("Add", y, self.constant(linear.bias))

    def scaled(self, x: str, factor: float) -> str:
        return x if factor == 1.0 else self.node("Mul", x, self.constant(np.array(factor, np.float32)))

    def split(self, x: str, *sizes: int) -> list[str]:
        """Split the last axis into parts of these sizes."""
        names = [f"Split_{len(self.nodes)}_{index}" for index in range(len(sizes))]
        self.node("Split", x, self.constant(np.array(sizes)), outputs=tuple(names), axis=-1)
        return names

    def _block_product(self, x: str, matrix: BlockMatrix) -> str:
        """Add `x @ matrix.T`: the product with the codes and scales, plus any shifts times the sum of x in each block."""
        rows, columns = matrix.shape
        inputs = [x, self.weight(matrix.codes), self.weight(matrix.scale)]
        attributes = {"K": columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block}
        attributes["accuracy_level"] = self.precision.level
        self.packed_bytes += 2 * matrix.scale.nbytes if self.precision.packs else 0
        shift = matrix.shift
        if shift is not None and self.precision.zero_points:
            zero_points, shift = zero_points_and_shifts(matrix)
            inputs.append(self.weight(zero_points))
        y = self.node("MatMulNBits", *inputs, domain=MS, outputs=(), **attributes)
        if shift is None:
            return y
        blocks = self.node("Reshape", x, self.constant(np.array([-1, columns // matrix.block, matrix.block])))
        sums = self.node("ReduceSum", blocks, self.constant(np.array([2])), keepdims=0)
        return self.node("Gemm", sums, self.weight(np.ascontiguousarray(shift.T)), y)

    def _dense_product(self, x: str, matrix: DenseMatrix) -> str:
        """Add `x @ matrix.T`. Weights of 16 bits are widened in each run, and multiplied in slices of `DENSE_COLUMNS` columns."""
        if matrix.values.dtype == np.float32:
            return self.node("Gemm", x, self.weight(matrix.values), transB=1)
        kind = TensorProto.BFLOAT16 if matrix.values.dtype == np.uint16 else None
        columns = matrix.shape[1]
        starts = range(0, columns, DENSE_COLUMNS)
        widths = [min(DENSE_COLUMNS, columns - start) for start in starts]
        parts = self.split(x, *widths) if len(widths) > 1 else [x]
        summed = ""
        for part, start, width in zip(parts, starts, widths, strict=True):
            weight = self.weight(np.ascontiguousarray(matrix.values[:, start : start + width]), kind)
            wide = self.node("Cast", weight, to=TensorProto.FLOAT)
            summed = self.node("Gemm", part, wide, *([summed] if summed else []), transB=1)
        return summed


def project_subgraph(weights: NetworkWeights, layer: int, precision: Precision) -> Subgraph:
    """Make the subgraph (hidden, cos, sin) -> (q, k, v): `layer` up to its attention."""
    graph = GraphBuilder(precision)
    _project(graph, weights, layer, "hidden")
    return _subgraph(graph, weights.spec, ["hidden", *_rotation_inputs(weights.spec, layer)], ["q", "k", "v"])


def mix_project_subgraph(weights: NetworkWeights, layer: int, precision: Precision) -> Subgraph:
    """Make the subgraph (mixed, residual, cos, sin) -> (hidden, q, k, v).

    It computes `layer` after its attention, then `layer + 1` up to its attention.
    """
    graph = GraphBuilder(precision)
    _project(graph, weights, layer + 1, _mix(graph, weights, layer))
    return _subgraph(
        graph, weights.spec, ["mixed", "residual", *_rotation_inputs(weights.spec, layer + 1)], ["hidden", "q", "k", "v"]
    )


def mix_subgraph(weights: NetworkWeights, layer: int, precision: Precision) -> Subgraph:
    """Make the subgraph (mixed, residual) -> (hidden): `layer` after its attention."""
    graph = GraphBuilder(precision)
    _mix(graph, weights, layer)
    return _subgraph(graph, weights.spec, ["mixed", "residual"], ["hidden"])


def route_subgraph(weights: NetworkWeights, layer: int, precision: Precision) -> Subgraph:
    """Make the subgraph (mixed, residual) -> (hidden, normed, scores): from the attention to the router's scores."""
    graph = GraphBuilder(precision)
    hidden, normed = _after_attention(graph, weights, layer)
    scores = graph.product(normed, weights.router(layer))
    for name, value in {"hidden": hidden, "normed": normed, "scores": scores}.items():
        graph.node("Identity", value, outputs=(name,))
    return _subgraph(graph, weights.spec, ["mixed", "residual"], ["hidden", "normed", "scores"])


def expert_subgraph(spec: ModelSpec, expert: Expert, precision: Precision) -> Subgraph:
    """Make the subgraph (normed) -> (hidden): one expert's MLP."""
    graph = GraphBuilder(precision)
    graph.node("Identity", _mlp(graph, spec, "normed", expert.gate_up, expert.down), outputs=("hidden",))
    return _subgraph(graph, spec, ["normed"], ["hidden"])


def head_subgraphs(weights: NetworkWeights, precision: Precision) -> Iterator[Subgraph]:
    """Make a subgraph (hidden) -> (logits) for each part of the vocabulary.

    Packing a large head at once would take twice its memory, in addition to the head itself.
    """
    for part in weights.head(_head_rows(weights.spec)):
        yield _head_subgraph(weights, part, precision)


def head_part_count(spec: ModelSpec) -> int:
    """Count the subgraphs that `head_subgraphs` makes."""
    return -(-spec.vocab // _head_rows(spec))


def _head_rows(spec: ModelSpec) -> int:
    return max(1, HEAD_PART_WEIGHTS // spec.hidden)


def _head_subgraph(weights: NetworkWeights, part: Projection, precision: Precision) -> Subgraph:
    graph, spec = GraphBuilder(precision), weights.spec
    logits = graph.product(graph.norm("hidden", weights.output_norm(), spec.norm_eps), part)
    logits = graph.scaled(logits, spec.logit_scale)
    if spec.logit_soft_cap:
        logits = graph.scaled(graph.node("Tanh", graph.scaled(logits, 1 / spec.logit_soft_cap)), spec.logit_soft_cap)
    graph.node("Identity", logits, outputs=("logits",))
    return _subgraph(graph, spec, ["hidden"], ["logits"])


def product_subgraph(linear: Projection, precision: Precision) -> Subgraph:
    """Make the subgraph (x) -> (y): a single product."""
    graph = GraphBuilder(precision)
    graph.node("Identity", graph.product("x", linear), outputs=("y",))
    return _build(graph, {"x": linear.matrices[0].shape[1]}, {"y": sum(matrix.shape[0] for matrix in linear.matrices)})


def _rotation_inputs(spec: ModelSpec, layer: int) -> list[str]:
    return ["cos", "sin"] if spec.is_rotated(layer) else []


def _project(graph: GraphBuilder, weights: NetworkWeights, layer: int, hidden: str) -> None:
    """Add norm, QKV, norms of Q and K, and rope. Q and K are rotated as one array, with their heads side by side."""
    spec = weights.spec
    normed = graph.norm(hidden, weights.norm(layer, "attn_norm"), spec.norm_eps) if spec.pre_norm else hidden
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qkv = graph.product(normed, weights.qkv(layer))
    norms = weights.qk_norms(layer)
    if norms is None:
        qk, v = graph.split(qkv, queries + keys, keys)
    else:
        q, k, v = graph.split(qkv, queries, keys, keys)
        normed_q, normed_k = (_qk_norm(graph, spec, part, norm) for part, norm in zip((q, k), norms, strict=True))
        qk = graph.node("Concat", normed_q, normed_k, axis=-1)
    if spec.is_rotated(layer):
        qk = _rotate(graph, spec, qk)
    graph.node("Split", qk, graph.constant(np.array([queries, keys])), outputs=("q", "k"), axis=-1)
    graph.node("Identity", v, outputs=("v",))


def _qk_norm(graph: GraphBuilder, spec: ModelSpec, x: str, weight: F32) -> str:
    """Add the norm of Q or K: of each head separately, or of all heads together."""
    if spec.qk_norm == "all":
        return graph.norm(x, weight, spec.norm_eps)
    heads = graph.node("Reshape", x, graph.constant(np.array([0, -1, spec.head_dim])))
    return graph.node("Flatten", graph.norm(heads, weight, spec.norm_eps), axis=1)


def _rotate(graph: GraphBuilder, spec: ModelSpec, qk: str) -> str:
    axis, first = graph.constant(np.array([0])), graph.constant(np.array([0]))
    batch = graph.node("Unsqueeze", qk, axis)
    attributes = {"interleaved": int(not spec.rope_halves), "num_heads": spec.heads + spec.kv_heads}
    if spec.rope_dim:
        attributes["rotary_embedding_dim"] = spec.rope_dim
    rotated = graph.node("RotaryEmbedding", batch, first, "cos", "sin", domain=MS, outputs=(), **attributes)
    return graph.node("Squeeze", rotated, axis)


def _after_attention(graph: GraphBuilder, weights: NetworkWeights, layer: int) -> tuple[str, str]:
    """Add output projection, norm and residual, then the norm before the MLP. Returns: the new residual and the MLP's input."""
    spec = weights.spec
    change = graph.product("mixed", weights.attention_output(layer))
    if spec.post_norm:
        change = graph.norm(change, weights.norm(layer, "post_attention_norm"), spec.norm_eps)
    hidden = graph.node("Add", graph.scaled(change, spec.residual_scale), "residual")
    return hidden, graph.norm(hidden, weights.norm(layer, spec.ffn_norm), spec.norm_eps) if spec.pre_norm else hidden


def _mix(graph: GraphBuilder, weights: NetworkWeights, layer: int) -> str:
    """Add a layer without experts after its attention. Returns: its output."""
    spec = weights.spec
    hidden, normed = _after_attention(graph, weights, layer)
    change = _mlp(graph, spec, normed, weights.gate_up(layer), weights.down(layer))
    if spec.post_norm:
        change = graph.norm(change, weights.norm(layer, "post_ffw_norm"), spec.norm_eps)
    return graph.node("Add", graph.scaled(change, spec.residual_scale), hidden, outputs=("hidden",))


def _mlp(graph: GraphBuilder, spec: ModelSpec, x: str, gate_up: Projection, down: Projection) -> str:
    gate, up = graph.split(graph.product(x, gate_up), spec.ffn, spec.ffn)
    match spec.activation:
        case "silu":
            gate = graph.node("QuickGelu", gate, domain=MS, outputs=(), alpha=1.0)
        case "gelu_tanh":
            gate = graph.node("FastGelu", gate, domain=MS)
        case "clamped":
            low, high, one = (graph.constant(np.array(value, np.float32)) for value in (-CLAMP, CLAMP, 1.0))
            gate = graph.node("QuickGelu", graph.node("Min", gate, high), domain=MS, outputs=(), alpha=CLAMPED_SLOPE)
            up = graph.node("Add", graph.node("Clip", up, low, high), one)
    return graph.product(graph.node("Mul", gate, up), down)


def _subgraph(graph: GraphBuilder, spec: ModelSpec, inputs: list[str], outputs: list[str]) -> Subgraph:
    pairs = (spec.rope_dim or spec.head_dim) // 2
    widths: dict[str, int | str] = {
        "mixed": spec.heads * spec.head_dim,
        "cos": pairs,
        "sin": pairs,
        "q": spec.heads * spec.head_dim,
        "k": spec.kv_heads * spec.head_dim,
        "v": spec.kv_heads * spec.head_dim,
        "scores": spec.experts,
        "logits": "vocabulary",
    }

    return _build(graph, *({name: widths.get(name, spec.hidden) for name in names} for names in (inputs, outputs)))


def _build(graph: GraphBuilder, inputs: dict[str, int | str], outputs: dict[str, int | str]) -> Subgraph:
    """Turn a graph into a subgraph. `inputs` and `outputs` map each name to its width."""

    def values(widths: dict[str, int | str]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width]) for name, width in widths.items()]

    body = helper.make_graph(graph.nodes, "subgraph", values(inputs), values(outputs), graph.constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=9)
    return Subgraph(model, graph.weights, graph.packed_bytes)
