from meshd.cli.bench import render

RATES = {
    "decode_bytes_s": 8.3e9, "prefill_flops_s": 1.07e11, "memory_bytes_s": 2.77e10,
    "attention_bytes_s": 7.1e9, "disk_bytes_s": 1.5e9, "layer_overhead_s": 6.4e-5,
}  # fmt: skip
REPORT = {
    "processor": "a processor", "cores": 4, "threads": 2, "backend": "onnxruntime", "rates": RATES,
    "numerics": "onnxruntime/int8/512/0123456789abcdef",
    "memory_total_bytes": 8 * 2**30, "memory_free_bytes": 2**30, "memory_bound_by": "--memory", "power_w": None,
    "backends": [
        {"backend": "onnxruntime", "rates": RATES, "power_w": None, "error": ""},
        {"backend": "torch", "rates": None, "power_w": None, "error": "no result after 5 s"},
    ],
    "measured_at": 1.0, "cached": False, "elapsed_s": 12.0,
}  # fmt: skip


def test_a_device_is_shown_with_every_backend_and_the_one_in_use() -> None:
    lines = render(REPORT).splitlines()
    assert lines[0] == "a processor: 4 cores, 2 threads, measured in 12.0 s"
    assert lines[1] == "memory: 1.0 GiB free of 8.0 GiB, bound by --memory"
    assert "numerics: onnxruntime/int8/512/0123456789abcdef" in lines
    assert lines[-2].split() == ["onnxruntime", "8.3", "GB/s", "107", "GFLOP/s", "7.1", "GB/s", "27.7", "GB/s", "64", "us", "used"]
    assert lines[-1].endswith("no result after 5 s")


def test_a_stored_measurement_is_marked() -> None:
    assert "as measured before" in render({**REPORT, "cached": True})
