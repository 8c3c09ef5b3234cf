"""Holders of a part of sessions' KV: in this process, and in another one."""
