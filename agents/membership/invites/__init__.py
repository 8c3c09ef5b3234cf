"""Finds open invites on the LAN."""
