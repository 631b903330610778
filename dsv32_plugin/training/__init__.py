"""The paper's losses, and the recipe of the trained tiny checkpoint (extra `train`): plain torch, never an engine."""
