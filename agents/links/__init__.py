"""One authenticated pair of connections with each peer."""
