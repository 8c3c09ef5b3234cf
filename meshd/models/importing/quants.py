"""The quantisations that a model can be given as it is imported."""

from collections.abc import Mapping

QUANTS: Mapping[str, str] = {"q8": "Q8_0", "q4": "Q4_1"}
"""What `--quant` may be -> GGUF's name of the kind that large weights become."""
