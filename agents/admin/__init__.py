"""What people and their tools see of the cluster, and ask of it."""
