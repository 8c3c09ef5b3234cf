"""A backend whose hidden states and KV nobody can look into, as those on a GPU: the proof that the agents need no arrays."""
