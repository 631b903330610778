"""The scores of the index keys for every query token, paged and ragged."""
