"""Plans for sessions: the first one, and every change of plan afterwards."""
