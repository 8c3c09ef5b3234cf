"""The link protocol: frames, messages, identity and the handshake. Only `transport` does I/O."""
