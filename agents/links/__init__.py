"""Connections with other peers: one authenticated link each, with requests, replies and measurements over it.

`link_table.py` decides that a link has ended; `membership` decides what that means for the peer.
"""
