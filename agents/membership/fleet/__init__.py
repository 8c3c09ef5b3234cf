"""Fleets: an MQTT broker brings peers of several networks together, and serves devices that speak only MQTT."""
