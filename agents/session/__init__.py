"""Sessions on the peer that coordinates them: their state, their plans, their stages, and their journal on other peers."""
