"""Clients, faults and verdicts of a chaos run."""
