"""Why a plan is what it is."""
