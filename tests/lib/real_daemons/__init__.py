"""Real daemons for tests: processes of `meshd up`, on this machine or in network namespaces."""
