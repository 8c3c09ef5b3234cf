"""The id of a way to compute, from what fixed inputs give on this device."""
