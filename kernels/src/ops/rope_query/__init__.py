"""Rope of the attention queries."""
