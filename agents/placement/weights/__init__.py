"""Weight tensors fetched from and served to other peers."""
