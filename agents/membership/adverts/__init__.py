"""What peers publish about themselves: a profile, which changes seldom, and a status, which is small and sent often."""
