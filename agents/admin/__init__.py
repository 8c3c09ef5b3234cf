"""The admin interface: what people and tools read about the cluster, and the operations they start."""
