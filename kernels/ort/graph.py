"""Builds the graphs that the onnxruntime backend runs: a layer's pieces between two attentions.

Every piece is made of the same operators in the same order wherever a stage is cut, and runs with graph optimisation off, so that
nothing is fused in the middle of a stage that is not fused at its border: this is what keeps the bits the same for any split.
Operators outside ONNX's own set are documented in onnxruntime's `docs/ContribOperators.md`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from meshd.kernels.weights.layers import CLAMP, CLAMPED_SLOPE, Expert, NetworkWeights, Projection
from meshd.kernels.weights.load import F32, BlockMatrix, DenseMatrix
from meshd.kernels.weights.matrices import centred
from meshd.types import ModelSpec

MS = "com.microsoft"
HEAD_PART_WEIGHTS = 16 << 20
ACCURACY_F32, ACCURACY_INT8 = 1, 4
"""Of products: in float32, or with activations quantised to int8, one scale for each block of the weights; sums are float32."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How products are computed."""

    level: int
    """ACCURACY_F32 or ACCURACY_INT8."""
    zeros: bool
    """Groups of kinds with minima have zero points: rounded activations err less. Of no use where they are exact."""


@dataclass(frozen=True, slots=True)
class Weight:
    """An array that is handed to the session from memory."""

    value: npt.NDArray[np.generic]
    kind: int
    """ONNX's element type; numpy has no bfloat16."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A graph and the weights that it names."""

    model: ModelProto
    weights: dict[str, Weight]

    @property
    def bytes(self) -> int:
        return sum(weight.value.nbytes for weight in self.weights.values())


@dataclass(slots=True)
class Graph:
    """A graph in the making. Methods add operators and return the names of their results."""

    precision: Precision
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)

    def node(self, operator: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attributes: float) -> str:
        """One operator; its first output is named after its number unless `outputs` says otherwise."""
        names = outputs or (f"{operator}_{len(self.nodes)}",)
        node = helper.make_node(operator, inputs, names, domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return names[0]

    def constant(self, value: npt.NDArray[np.generic]) -> str:
        """A small array within the graph."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, value: npt.NDArray[np.generic], kind: int | None = None) -> str:
        """An array outside the graph; `kind` where its bits mean another type than numpy's."""
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
        """`x @ w.T + bias`, matrices laid end to end."""
        parts = [self._block_product(x, m) if isinstance(m, BlockMatrix) else self._dense_product(x, m) for m in linear.matrices]
        y = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=-1)
        return y if linear.bias is None else self.node("Add", y, self.constant(linear.bias))

    def scaled(self, x: str, factor: float) -> str:
        return x if factor == 1.0 else self.node("Mul", x, self.constant(np.array(factor, np.float32)))

    def split(self, x: str, *sizes: int) -> list[str]:
        """Pieces of the last axis."""
        names = [f"Split_{len(self.nodes)}_{index}" for index in range(len(sizes))]
        self.node("Split", x, self.constant(np.array(sizes)), outputs=tuple(names), axis=-1)
        return names

    def _block_product(self, x: str, matrix: BlockMatrix) -> str:
        """The integer product on codes and scales; shifts act on the sums of x over each block, in float32."""
        rows, columns = matrix.shape
        inputs = [x, self.weight(matrix.codes), self.weight(matrix.scale)]
        attributes = {"K": columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block}
        attributes["accuracy_level"] = self.precision.level
        shift = matrix.shift
        if shift is not None and self.precision.zeros:
            zero, shift = centred(matrix)
            inputs.append(self.weight(zero))
        y = self.node("MatMulNBits", *inputs, domain=MS, outputs=(), **attributes)
        if shift is None:
            return y
        blocks = self.node("Reshape", x, self.constant(np.array([-1, columns // matrix.block, matrix.block])))
        sums = self.node("ReduceSum", blocks, self.constant(np.array([2])), keepdims=0)
        return self.node("Gemm", sums, self.weight(np.ascontiguousarray(shift.T)), y)

    def _dense_product(self, x: str, matrix: DenseMatrix) -> str:
        kind = TensorProto.BFLOAT16 if matrix.values.dtype == np.uint16 else None
        weight = self.weight(matrix.values, kind)
        if matrix.values.dtype != np.float32:
            weight = self.node("Cast", weight, to=TensorProto.FLOAT)
        return self.node("Gemm", x, weight, transB=1)


def project_piece(weights: NetworkWeights, layer: int, precision: Precision) -> Piece:
    """(hidden, cos, sin) -> q, k, v."""
    graph = Graph(precision)
    _project(graph, weights, layer, "hidden")
    return _piece(graph, weights.spec, ["hidden", *_turn(weights.spec, layer)], ["q", "k", "v"])


def mix_project_piece(weights: NetworkWeights, layer: int, precision: Precision) -> Piece:
    """(mixed, residual, cos, sin) -> hidden, q, k, v: `layer` after its attention, layer + 1 before its own."""
    graph = Graph(precision)
    _project(graph, weights, layer + 1, _mix(graph, weights, layer))
    return _piece(graph, weights.spec, ["mixed", "residual", *_turn(weights.spec, layer + 1)], ["hidden", "q", "k", "v"])


def mix_piece(weights: NetworkWeights, layer: int, precision: Precision) -> Piece:
    """(mixed, residual) -> hidden."""
    graph = Graph(precision)
    _mix(graph, weights, layer)
    return _piece(graph, weights.spec, ["mixed", "residual"], ["hidden"])


def route_piece(weights: NetworkWeights, layer: int, precision: Precision) -> Piece:
    """(mixed, residual) -> hidden, normed, scores: a layer with experts, up to the choice of these."""
    graph = Graph(precision)
    hidden, normed = _after_attention(graph, weights, layer)
    scores = graph.product(normed, weights.router(layer))
    for name, value in {"hidden": hidden, "normed": normed, "scores": scores}.items():
        graph.node("Identity", value, outputs=(name,))
    return _piece(graph, weights.spec, ["mixed", "residual"], ["hidden", "normed", "scores"])


def expert_piece(spec: ModelSpec, expert: Expert, precision: Precision) -> Piece:
    """(normed) -> hidden: one expert's MLP."""
    graph = Graph(precision)
    graph.node("Identity", _mlp(graph, spec, "normed", expert.gate_up, expert.down), outputs=("hidden",))
    return _piece(graph, spec, ["normed"], ["hidden"])


def head_pieces(weights: NetworkWeights, precision: Precision) -> Iterator[Piece]:
    """(hidden) -> logits of some of the vocabulary: packing a large table at once would take as much again, twice."""
    for part in weights.head(_head_rows(weights.spec)):
        yield _head_piece(weights, part, precision)


def head_parts(spec: ModelSpec) -> int:
    """How many pieces there are."""
    return -(-spec.vocab // _head_rows(spec))


def _head_rows(spec: ModelSpec) -> int:
    return max(1, HEAD_PART_WEIGHTS // spec.hidden)


def _head_piece(weights: NetworkWeights, part: Projection, precision: Precision) -> Piece:
    graph, spec = Graph(precision), weights.spec
    logits = graph.product(graph.norm("hidden", weights.output_norm(), spec.norm_eps), part)
    logits = graph.scaled(logits, spec.logit_scale)
    if spec.logit_soft_cap:
        logits = graph.scaled(graph.node("Tanh", graph.scaled(logits, 1 / spec.logit_soft_cap)), spec.logit_soft_cap)
    graph.node("Identity", logits, outputs=("logits",))
    return _piece(graph, spec, ["hidden"], ["logits"])


def product_piece(linear: Projection, precision: Precision) -> Piece:
    """(x) -> y: a product alone."""
    graph = Graph(precision)
    graph.node("Identity", graph.product("x", linear), outputs=("y",))
    return _made(graph, {"x": linear.matrices[0].shape[1]}, {"y": sum(matrix.shape[0] for matrix in linear.matrices)})


def _turn(spec: ModelSpec, layer: int) -> list[str]:
    return ["cos", "sin"] if spec.is_rotated(layer) else []


def _project(graph: Graph, weights: NetworkWeights, layer: int, hidden: str) -> None:
    """Norm, QKV, norms of Q and K, rope. Q and K are rotated as one array, heads side by side."""
    spec = weights.spec
    normed = graph.norm(hidden, weights.norm(layer, "attn_norm"), spec.norm_eps) if spec.pre_norm else hidden
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qkv = graph.product(normed, weights.qkv(layer))
    norms = weights.qk_norms(layer)
    if norms is None:
        qk, v = graph.split(qkv, queries + keys, keys)
    else:
        q, k, v = graph.split(qkv, queries, keys, keys)
        normed_q, normed_k = (_head_norm(graph, spec, part, norm) for part, norm in zip((q, k), norms, strict=True))
        qk = graph.node("Concat", normed_q, normed_k, axis=-1)
    if spec.is_rotated(layer):
        qk = _rotate(graph, spec, qk)
    graph.node("Split", qk, graph.constant(np.array([queries, keys])), outputs=("q", "k"), axis=-1)
    graph.node("Identity", v, outputs=("v",))


def _head_norm(graph: Graph, spec: ModelSpec, x: str, weight: F32) -> str:
    """Each head by itself, or all of them together."""
    if spec.qk_norm == "all":
        return graph.norm(x, weight, spec.norm_eps)
    heads = graph.node("Reshape", x, graph.constant(np.array([0, -1, spec.head_dim])))
    return graph.node("Flatten", graph.norm(heads, weight, spec.norm_eps), axis=1)


def _rotate(graph: Graph, spec: ModelSpec, qk: str) -> str:
    axis, first = graph.constant(np.array([0])), graph.constant(np.array([0]))
    batch = graph.node("Unsqueeze", qk, axis)
    attributes = {"interleaved": int(not spec.rope_halves), "num_heads": spec.heads + spec.kv_heads}
    if spec.rope_dim:
        attributes["rotary_embedding_dim"] = spec.rope_dim
    turned = graph.node("RotaryEmbedding", batch, first, "cos", "sin", domain=MS, outputs=(), **attributes)
    return graph.node("Squeeze", turned, axis)


def _after_attention(graph: Graph, weights: NetworkWeights, layer: int) -> tuple[str, str]:
    """Output projection, norm, residual; and the norm before the MLP. Returns the residual and the MLP's input."""
    spec = weights.spec
    change = graph.product("mixed", weights.attention_output(layer))
    if spec.post_norm:
        change = graph.norm(change, weights.norm(layer, "post_attention_norm"), spec.norm_eps)
    hidden = graph.node("Add", graph.scaled(change, spec.residual_scale), "residual")
    return hidden, graph.norm(hidden, weights.norm(layer, spec.ffn_norm), spec.norm_eps) if spec.pre_norm else hidden


def _mix(graph: Graph, weights: NetworkWeights, layer: int) -> str:
    """A layer without experts from its attention's result on."""
    spec = weights.spec
    hidden, normed = _after_attention(graph, weights, layer)
    change = _mlp(graph, spec, normed, weights.gate_up(layer), weights.down(layer))
    if spec.post_norm:
        change = graph.norm(change, weights.norm(layer, "post_ffw_norm"), spec.norm_eps)
    return graph.node("Add", graph.scaled(change, spec.residual_scale), hidden, outputs=("hidden",))


def _mlp(graph: Graph, spec: ModelSpec, x: str, gate_up: Projection, down: Projection) -> str:
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


def _piece(graph: Graph, spec: ModelSpec, inputs: list[str], outputs: list[str]) -> Piece:
    turned = (spec.rope_dim or spec.head_dim) // 2
    widths: dict[str, int | str] = {
        "mixed": spec.heads * spec.head_dim,
        "cos": turned,
        "sin": turned,
        "q": spec.heads * spec.head_dim,
        "k": spec.kv_heads * spec.head_dim,
        "v": spec.kv_heads * spec.head_dim,
        "scores": spec.experts,
        "logits": "vocabulary",
    }

    return _made(graph, *({name: widths.get(name, spec.hidden) for name in names} for names in (inputs, outputs)))


def _made(graph: Graph, inputs: dict[str, int | str], outputs: dict[str, int | str]) -> Piece:
    """`inputs` and `outputs` with the width of each."""

    def values(widths: dict[str, int | str]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width]) for name, width in widths.items()]

    body = helper.make_graph(graph.nodes, "piece", values(inputs), values(outputs), graph.constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=9)
    return Piece(model, graph.weights)
