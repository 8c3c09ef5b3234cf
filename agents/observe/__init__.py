"""Records of what happens on this peer: live events, and the story of each session."""
