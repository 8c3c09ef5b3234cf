"""Times and stages for a session that is already running."""
