"""The coordinator's side of a request: its session, the session's plan, and its journal on other peers."""
