"""The exact top K of every row of scores, in ascending position."""
