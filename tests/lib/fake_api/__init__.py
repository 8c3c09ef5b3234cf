"""Servers and suites for tests of the HTTP API and its clients."""
