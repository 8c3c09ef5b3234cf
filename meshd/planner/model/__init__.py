"""Predict what a plan costs in time, traffic and memory, from measurements."""
