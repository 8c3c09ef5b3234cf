"""Which devices belong to the cluster: its key, the owner's rotations of it, and the peers that were ever linked."""
