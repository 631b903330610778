"""Rows of the paged caches, collected sequence after sequence."""
