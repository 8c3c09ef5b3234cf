"""The terminal monitor's room. `meshd top` will live here; it speaks to a daemon over its HTTP API alone."""
