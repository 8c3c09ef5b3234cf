"""Simulated clients: their requests, their connections, and the checks of what they receive."""
