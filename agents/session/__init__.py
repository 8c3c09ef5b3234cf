"""Requests on the peer that took them."""
