"""The routes under `/v1/responses`."""
