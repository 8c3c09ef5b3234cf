"""The actors of a peer: each owns its state, takes events and gives commands."""
