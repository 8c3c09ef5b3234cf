"""Copies of a stage's KV on another peer: sends those of this peer's stages, and stores those of other peers' stages."""
