"""This peer's part in the sessions that run through it."""
