"""The toy model: exact arithmetic modulo a prime, so that any damage to KV or to the order of steps changes the tokens."""
