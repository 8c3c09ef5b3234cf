"""Lists the installed backends, and makes a backend by its name."""

from importlib.util import find_spec

from meshd.errors import ConfigError
from meshd.kernels.backend import EXACT, Backend

ACCELERATED = ("torch-cuda", "torch-mps")
"""Names of the torch backend with its products on an accelerator."""


def available_backends() -> tuple[str, ...]:
    """List the backends whose libraries are installed, fastest first, without their variants. Does not import the libraries."""
    libraries = {"onnxruntime": ("onnxruntime", "onnx", "torch"), "torch": ("torch",)}
    return tuple(name for name, needed in libraries.items() if all(find_spec(library) for library in needed))


def make_backend(name: str, threads: int) -> Backend:
    """Make a backend that computes with `threads` threads of this process.

    Raises: ConfigError for an unknown name, a library or accelerator that is missing, or a thread count below 1.
    """
    if threads < 1:
        raise ConfigError(f"{threads} threads can't compute: at least one is needed", hint="set --threads to 1 or more")
    plain = name.partition("-")[0] if name in (f"onnxruntime{EXACT}", *ACCELERATED) else name
    if plain not in available_backends():
        known = ", ".join(available_backends()) or "none"
        raise ConfigError(
            f"no backend {name!r} here: installed are {known}", hint="choose an installed one, or install its library"
        )
    if name.startswith("torch"):
        from meshd.kernels.torch.backend import TorchBackend

        return TorchBackend(threads, name.partition("-")[2] or "cpu")
    from meshd.kernels.ort.backend import OrtBackend

    return OrtBackend(threads, exact=name != plain)
