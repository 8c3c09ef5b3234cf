"""The wire: frames, messages, identity. No I/O but in `transport`."""
