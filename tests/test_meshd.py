"""The package itself: what importing it must do before any library is loaded."""

import os
import subprocess
import sys
from pathlib import Path

RUN_A_MODEL = """
import numpy as np
from meshd.kernels.ort import backend
import onnxruntime
from onnx import TensorProto, helper
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])
graph = helper.make_graph([helper.make_node("Add", ["a", "a"], ["b"])], "piece", [value("a")], [value("b")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
session = onnxruntime.InferenceSession(model.SerializeToString())
print(session.run(None, {"a": np.ones(2, np.float32)})[0].tolist())
"""


def _run(script: str, home: Path) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_running_a_model_collects_no_report_for_the_makers_of_onnxruntime(tmp_path: Path) -> None:
    assert _run(RUN_A_MODEL, tmp_path) == "[2.0, 2.0]\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []  # it keeps its reports and a device id in ~/.cache


def test_requests_to_a_hub_do_not_say_which_libraries_are_installed(tmp_path: Path) -> None:
    header = _run(
        "import meshd; from huggingface_hub.utils import build_hf_headers; print(build_hf_headers()['user-agent'])", tmp_path
    )
    assert "torch" not in header
