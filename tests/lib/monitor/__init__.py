"""Helpers of tests of the monitor: recorded events, and a story that a real cluster acts out."""
