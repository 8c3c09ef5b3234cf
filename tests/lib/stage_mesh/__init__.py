"""Stages of several peers in one process, linked through memory, and a coordinator to drive them."""
