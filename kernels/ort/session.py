"""One onnxruntime session: a subgraph with its own packed copy of the weights."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from meshd.kernels.ort.graph import Subgraph
from meshd.kernels.weights.kinds import F32

SPIN_US = 100
"""Microseconds that an idle thread of a session's pool spins before it sleeps."""


class OrtSession:
    """Runs a subgraph. All its inputs and outputs have one row for each token."""

    def __init__(self, subgraph: Subgraph, threads: int, least_rows: int = 1) -> None:
        """The weights are copied, so that the subgraph can be freed. `least_rows`: see `trials.least_rows`."""
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # graph.py explains why
        options.enable_cpu_mem_arena = False
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        values = [ort.OrtValue.ortvalue_from_numpy_with_onnx_type(w.value, w.kind) for w in subgraph.weights.values()]
        options.add_external_initializers(list(subgraph.weights), values)
        self._session = ort.InferenceSession(subgraph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._least_rows = least_rows
        self.bytes = subgraph.bytes
        """Bytes of weights that this session holds."""

    def run(self, outputs: Sequence[str], inputs: Mapping[str, F32]) -> list[F32]:
        """Compute the outputs of at least one token. Fewer rows than `least_rows` are computed beside copies of the last one."""
        rows = len(next(iter(inputs.values())))
        if rows >= self._least_rows:
            results: list[F32] = self._session.run(outputs, inputs)
            return results
        missing = self._least_rows - rows
        padded = {name: np.concatenate([value, *[value[-1:]] * missing]) for name, value in inputs.items()}
        return [result[:rows] for result in self._session.run(outputs, padded)]
