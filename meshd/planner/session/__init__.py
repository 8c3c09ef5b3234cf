"""Pauses and routes for a session that is already running."""
