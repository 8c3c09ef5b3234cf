"""A simulated peer: the real agents on a simulated network, clock and compute thread."""
