"""Fetches weight tensors from other peers and serves them to other peers."""
