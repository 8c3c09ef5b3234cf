"""The HTTP server: routes, bodies, errors, event streams, access."""
