"""Copies of KV between peers: sends the KV of this peer's stages, and stores the KV of other peers' stages."""
