"""The actors of a peer. Each owns its state, handles events and issues commands."""
