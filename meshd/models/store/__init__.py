"""Models on this device: found, downloaded and kept."""
