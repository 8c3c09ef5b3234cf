"""Authenticated links: one with each other peer, which carries messages, requests and their replies, and is measured.

`link_table.py` decides when a link has ended; `membership` then changes the peer's state.
"""
