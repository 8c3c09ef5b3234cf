"""The parts of a chaos run: clients, faults, repairs, and the verdict."""
