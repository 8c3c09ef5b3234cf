"""Model mathematics: tensors in, tensors out. No module depends on peers, plans or sockets."""
