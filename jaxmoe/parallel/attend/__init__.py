"""Strategies by which queries meet the keys of rows that are spread over a context group.

A strategy is `(parts, (q, k, v), tokens, mask, group) -> (B, L, N, P)`: a kind of attention, the
arrays of this device, its tokens, the mask, and the devices that have parts of the same rows.

gather.py      keys and values of all, for every kind
ring.py        keys and values travel, one part at a time
token_ring.py  queries travel, what they find goes back
ulysses.py     heads are exchanged for tokens
"""

from jaxmoe.parallel.attend.context_group import ContextGroup
from jaxmoe.parallel.attend.gather import gather
from jaxmoe.parallel.attend.ring import ring
from jaxmoe.parallel.attend.token_ring import token_ring
from jaxmoe.parallel.attend.ulysses import ulysses

ATTEND = {"gather": gather, "ring": ring, "token_ring": token_ring, "ulysses": ulysses}

__all__ = ["ATTEND", "ContextGroup"]
