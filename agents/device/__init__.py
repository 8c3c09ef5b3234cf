"""Measures this device's compute rates, memory, cores, disk and power. Also contains the thread that runs compute jobs."""
