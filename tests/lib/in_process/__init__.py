"""Real agents of several peers in one process."""
