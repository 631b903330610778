"""Expanded multi-head attention over ragged keys, optionally restricted to a selection."""
