"""The daemon of one device: its sockets, its peer, its API server, and what it answers to the command line."""
