"""meshd: one language model across many devices."""

import os

__version__ = "0.1.0"

_NO_REPORTS = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime: device id, processor, path of the executable, each session, sent to Microsoft
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub: which libraries are installed, in each request's headers
    "HF_XET_TELEMETRY_ENABLED": "0",  # hf_xet, which downloads for huggingface_hub: how each transfer went
    "DO_NOT_TRACK": "1",
}
"""Environment variables that stop libraries from reporting to their makers. Each library reads its variable when it is imported,
so they are set before any of them; onnxruntime's own function comes too late. Processes that are started inherit them."""

os.environ.update(_NO_REPORTS)
