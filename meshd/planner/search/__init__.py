"""Search for the best plan, for repairs, and for what to report if no plan fits."""
