"""The stages of sessions that run on this peer, their KV, and the copies of KV between peers."""
