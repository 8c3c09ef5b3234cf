"""The simulator: a whole cluster in one process, under a virtual clock and a seeded network."""
