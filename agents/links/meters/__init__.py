"""Meters of a link that the link itself does not need: its bytes, and the offset of the other clock."""
