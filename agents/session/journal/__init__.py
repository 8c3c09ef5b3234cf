"""Session records that deputies keep for a coordinator, so that a session can continue when its coordinator is lost."""
