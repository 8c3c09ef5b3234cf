"""Weights as matrices that a backend computes on."""
