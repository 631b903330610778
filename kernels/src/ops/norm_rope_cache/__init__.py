"""Norms and rope of everything a layer caches, and the writes of both caches."""
