"""The link protocol: frames, messages, identity and the handshake.

`transport` does network I/O, `identity` reads and writes key files; no other module does I/O.
"""
