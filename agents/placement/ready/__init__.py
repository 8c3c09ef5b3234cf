"""Makes loaded layers ready: checks and measures them, and makes the stages that sessions compute with."""
