"""Models from Hugging Face, fetched into the standard cache that other tools use too."""
