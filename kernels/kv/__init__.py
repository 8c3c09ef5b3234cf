"""The memory of sessions: one arena per peer and device, which knows what layers remember and not their weights."""
