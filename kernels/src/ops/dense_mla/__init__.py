"""Absorbed attention over every visible row of the latent cache."""
