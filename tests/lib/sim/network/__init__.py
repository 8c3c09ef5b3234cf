"""The seeded network: replaces the parts of `meshd.agents.links` that agents use, with virtual time instead of sockets."""
