"""The HTTP server: routes, bodies, errors, event streams and access control."""
