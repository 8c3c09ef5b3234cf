"""meshd: one language model across many devices."""

__version__ = "0.1.0"
