"""Which plan a session runs under, and every change of it."""
