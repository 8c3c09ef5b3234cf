"""Builds the graphs that the onnxruntime backend runs: a layer's pieces between two attentions.

Every piece is made of the same operators in the same order wherever a stage is cut, and runs with graph optimisation off, so that
nothing is fused in the middle of a stage that is not fused at its border: this is what keeps the bits the same for any split.
Operators outside ONNX's own set are documented in onnxruntime's `docs/ContribOperators.md`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from meshd.kernels.llama import LlamaWeights
from meshd.kernels.quant import F32, BlockMatrix, DenseMatrix, Matrix

MS = "com.microsoft"
ACCURACY_INT8 = 4
"""Activations are quantised to int8, one scale for each block of the weights; sums are float32."""


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

    def product(self, x: str, matrices: tuple[Matrix, ...]) -> str:
        """`x @ w.T`, matrices laid end to end."""
        parts = [self._block_product(x, m) if isinstance(m, BlockMatrix) else self._dense_product(x, m) for m in matrices]
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=-1)

    def _block_product(self, x: str, matrix: BlockMatrix) -> str:
        """The integer product on codes and scales; shifts act on the sums of x over each block, in float32."""
        rows, columns = matrix.shape
        inputs = x, self.weight(matrix.codes), self.weight(matrix.scale)
        attributes = {"K": columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block, "accuracy_level": ACCURACY_INT8}
        y = self.node("MatMulNBits", *inputs, domain=MS, outputs=(), **attributes)
        if matrix.shift is None:
            return y
        blocks = self.node("Reshape", x, self.constant(np.array([-1, columns // matrix.block, matrix.block])))
        sums = self.node("ReduceSum", blocks, self.constant(np.array([2])), keepdims=0)
        return self.node("Gemm", sums, self.weight(np.ascontiguousarray(matrix.shift.T)), y)

    def _dense_product(self, x: str, matrix: DenseMatrix) -> str:
        kind = TensorProto.BFLOAT16 if matrix.values.dtype == np.uint16 else None
        weight = self.weight(matrix.values, kind)
        if matrix.values.dtype != np.float32:
            weight = self.node("Cast", weight, to=TensorProto.FLOAT)
        return self.node("Gemm", x, weight, transB=1)


def project_piece(weights: LlamaWeights, layer: int) -> Piece:
    """(hidden, cos, sin) -> qk, v."""
    graph = Graph()
    _project(graph, weights, layer, "hidden")
    return _piece(graph, weights, ["hidden", "cos", "sin"], ["qk", "v"])


def mix_project_piece(weights: LlamaWeights, layer: int) -> Piece:
    """(mixed, residual, cos, sin) -> hidden, qk, v: `layer` after its attention, layer + 1 before its own."""
    graph = Graph()
    _project(graph, weights, layer + 1, _mix(graph, weights, layer))
    return _piece(graph, weights, ["mixed", "residual", "cos", "sin"], ["hidden", "qk", "v"])


def mix_piece(weights: LlamaWeights, layer: int) -> Piece:
    """(mixed, residual) -> hidden."""
    graph = Graph()
    _mix(graph, weights, layer)
    return _piece(graph, weights, ["mixed", "residual"], ["hidden"])


def head_piece(weights: LlamaWeights) -> Piece:
    """(hidden) -> logits."""
    graph = Graph()
    logits = graph.product(graph.norm("hidden", weights.output_norm(), weights.spec.norm_eps), weights.head())
    graph.node("Identity", logits, outputs=("logits",))
    return _piece(graph, weights, ["hidden"], ["logits"])


def _project(graph: Graph, weights: LlamaWeights, layer: int, hidden: str) -> None:
    """Norm, QKV, rope. Q and K are rotated as one array, heads side by side."""
    spec = weights.spec
    rotated = spec.heads + spec.kv_heads
    qkv = graph.product(graph.norm(hidden, weights.attention_norm(layer), spec.norm_eps), weights.qkv(layer))
    sizes = graph.constant(np.array([rotated * spec.head_dim, spec.kv_heads * spec.head_dim]))
    qk = graph.node("Split", qkv, sizes, outputs=("qk_plain", "v"), axis=-1)
    axis, first = graph.constant(np.array([0])), graph.constant(np.array([0]))
    batch = graph.node("Unsqueeze", qk, axis)
    turned = graph.node("RotaryEmbedding", batch, first, "cos", "sin", domain=MS, interleaved=1, num_heads=rotated)
    graph.node("Squeeze", turned, axis, outputs=("qk",))


def _mix(graph: Graph, weights: LlamaWeights, layer: int) -> str:
    """Output projection, residual, norm, SwiGLU, residual."""
    spec = weights.spec
    hidden = graph.node("Add", graph.product("mixed", weights.attention_output(layer)), "residual")
    normed = graph.norm(hidden, weights.ffn_norm(layer), spec.norm_eps)
    gate_up = graph.product(normed, weights.gate_up(layer))
    gate = graph.node("Split", gate_up, graph.constant(np.array([spec.ffn, spec.ffn])), outputs=("gate", "up"), axis=-1)
    activated = graph.node("Mul", graph.node("QuickGelu", gate, domain=MS, alpha=1.0), "up")
    return graph.node("Add", graph.product(activated, weights.down(layer)), hidden, outputs=("hidden",))


def _piece(graph: Graph, weights: LlamaWeights, inputs: list[str], outputs: list[str]) -> Piece:
    spec = weights.spec
    widths = {
        "mixed": spec.heads * spec.head_dim,
        "cos": spec.head_dim // 2,
        "sin": spec.head_dim // 2,
        "qk": (spec.heads + spec.kv_heads) * spec.head_dim,
        "v": spec.kv_heads * spec.head_dim,
        "logits": spec.vocab,
    }

    def values(names: Iterable[str]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", widths.get(name, spec.hidden)]) for name in names]

    body = helper.make_graph(graph.nodes, "piece", values(inputs), values(outputs), graph.constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=9)
    return Piece(model, graph.weights)
