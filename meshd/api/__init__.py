"""The HTTP API: OpenAI's routes, the routes of the cluster, health and metrics."""
