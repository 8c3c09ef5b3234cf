"""Session records kept by deputies, so that a session outlives its coordinator."""
