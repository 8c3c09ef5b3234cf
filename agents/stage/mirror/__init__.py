"""Copies of a stage's KV on other peers: those that this peer sends, and those that it keeps."""
