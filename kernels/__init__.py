"""Model mathematics: tensors in, tensors out. Nothing here depends on peers, plans or sockets."""
