"""Measures this device: rates, memory, cores, disk and power. Also holds the thread that it computes on."""
