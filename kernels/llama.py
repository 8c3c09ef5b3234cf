"""Llama's weights by their GGUF names, checked against the model's dimensions."""

from dataclasses import dataclass

from meshd.errors import ModelFileError
from meshd.kernels.backend import WeightSource
from meshd.kernels.quant import F32, Matrix, dequantise, load_matrix, stack
from meshd.kernels.rope import Rope
from meshd.types import ModelSpec, Tensor


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """Reads what a layer needs; each method raises ModelFileError for a tensor that is missing, broken or of another shape.

    A projection comes as one matrix, or as several to be laid end to end where their kinds differ.
    """

    spec: ModelSpec
    source: WeightSource

    def check_architecture(self) -> None:
        """Raises: ModelFileError if the network is not Llama's."""
        if self.spec.architecture != "llama":
            raise ModelFileError(
                f"this model can't be computed: its architecture {self.spec.architecture!r} is not known here",
                hint="use a model of the Llama family",
            )
        if self.spec.heads % self.spec.kv_heads:
            raise ModelFileError(f"{self.spec.heads} heads can't share {self.spec.kv_heads} KV heads: no whole number each")

    def rope(self) -> Rope:
        """Rotations, with the model's own frequency factors if it has any."""
        factors = self._vector("rope_freqs.weight", self.spec.head_dim // 2) if "rope_freqs.weight" in self.source else None
        return Rope(self.spec.head_dim, self.spec.rope_theta, factors)

    def embedding(self) -> Tensor:
        """`[vocab, hidden]`, as it lies in the file."""
        return self._tensor("token_embd.weight", (self.spec.vocab, self.spec.hidden))

    def attention_norm(self, layer: int) -> F32:
        return self._vector(f"blk.{layer}.attn_norm.weight", self.spec.hidden)

    def qkv(self, layer: int) -> tuple[Matrix, ...]:
        """`[(heads + 2 kv_heads) * head_dim, hidden]`."""
        spec = self.spec
        heights = {"q": spec.heads * spec.head_dim, "k": spec.kv_heads * spec.head_dim, "v": spec.kv_heads * spec.head_dim}
        return stack([self._matrix(f"blk.{layer}.attn_{part}.weight", height, spec.hidden) for part, height in heights.items()])

    def attention_output(self, layer: int) -> tuple[Matrix, ...]:
        """`[hidden, heads * head_dim]`."""
        return (self._matrix(f"blk.{layer}.attn_output.weight", self.spec.hidden, self.spec.heads * self.spec.head_dim),)

    def ffn_norm(self, layer: int) -> F32:
        return self._vector(f"blk.{layer}.ffn_norm.weight", self.spec.hidden)

    def gate_up(self, layer: int) -> tuple[Matrix, ...]:
        """`[2 * ffn, hidden]`."""
        names = [f"blk.{layer}.ffn_gate.weight", f"blk.{layer}.ffn_up.weight"]
        return stack([self._matrix(name, self.spec.ffn, self.spec.hidden) for name in names])

    def down(self, layer: int) -> tuple[Matrix, ...]:
        """`[hidden, ffn]`."""
        return (self._matrix(f"blk.{layer}.ffn_down.weight", self.spec.hidden, self.spec.ffn),)

    def output_norm(self) -> F32:
        return self._vector("output_norm.weight", self.spec.hidden)

    def head(self) -> tuple[Matrix, ...]:
        """`[vocab, hidden]`; the embedding table where the head is tied to it."""
        name = "token_embd.weight" if self.spec.tied_head else "output.weight"
        return (self._matrix(name, self.spec.vocab, self.spec.hidden),)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.source.tensor(name)
        if tensor.shape != shape:
            raise ModelFileError(f"tensor {name} has shape {tensor.shape}: the model's dimensions ask for {shape}")
        return tensor

    def _matrix(self, name: str, rows: int, columns: int) -> Matrix:
        return load_matrix(self._tensor(name, (rows, columns)))

    def _vector(self, name: str, size: int) -> F32:
        """A copy of its own, since torch can't hold a view of a read-only file."""
        return dequantise(self._tensor(name, (size,))).copy()
