"""What is placed on this peer outlives its restart: the record on disk, and its restoration."""
