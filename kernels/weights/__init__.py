"""Reads weights as matrices that a backend computes with."""
