"""Predict pauses and choose routes for sessions that are already running."""
