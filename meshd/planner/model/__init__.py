"""What a plan costs: times, bytes and memory, from measurements."""
