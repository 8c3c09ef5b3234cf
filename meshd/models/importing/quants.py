"""The quantisations that an import offers."""

from collections.abc import Mapping

QUANTS: Mapping[str, str] = {"q8": "Q8_0", "q4": "Q4_1"}
"""Value of `--quant` -> GGUF kind of the large weights."""
