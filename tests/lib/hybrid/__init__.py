"""A small model whose layers remember in every way: full, latent, windowed, recurrent, and shared with another layer."""
