"""Absorbed attention over the selected rows of the latent cache."""
