"""What a rollout chose, as it comes back with an answer: `decode_selection` reads the positions that were selected."""

from dsv32_plugin.rollout.selection import Selection, decode_selection

__all__ = ["Selection", "decode_selection"]
