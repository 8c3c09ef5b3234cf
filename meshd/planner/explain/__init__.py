"""Explain plans, and plan with what-if peers, which do not exist yet."""
