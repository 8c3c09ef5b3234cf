"""How a device joins by a short code: codes, the exchange of keys, and the messages. Not a part of the link protocol. No I/O."""
