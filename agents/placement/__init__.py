"""Which weights are on which peers, and how they get there."""
