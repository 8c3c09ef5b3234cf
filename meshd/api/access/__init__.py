"""Who may use the HTTP API: keys with scopes and limits, where they are stored, and the check of a request's key."""
