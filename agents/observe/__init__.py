"""What happens on this peer, for those who watch."""
