"""Model mathematics: tensors in, tensors out. Knows no peer, plan or socket."""
