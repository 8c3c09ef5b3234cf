"""The seeded network: what agents use of `meshd.agents.links`, over virtual time instead of sockets."""
