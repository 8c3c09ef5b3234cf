"""Lets a device join by a short code: the inviter's listener, the joiner, and the TLS channel between them. Not a link."""
