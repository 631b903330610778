"""The three chat APIs as their clients speak them: a request to one conversation, an answer back to the client's form.

Both engines read requests into classes of their own that drop, add and reorder, each API in another way. So a request
is read here, from its JSON, before an engine sees it (`gateway`); the engine is given a plain one that it serves
unchanged, and its encoder hook renders the `Conversation` of the request that is being served (`current`).
"""

from .conversation import Conversation, current, rendered
from .refusal import Refusal

__all__ = ["Conversation", "Refusal", "current", "rendered"]
