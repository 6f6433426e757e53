"""Routers: a gate with parameters, then a pure rule on its scores.

To add one, write its file (a record derived from `Router` with a `choose`), add one line to
ROUTERS, and the contract test runs it. A name may also stand for settings of another's record.
"""

from jaxmoe.moe.routers.gates import GATES
from jaxmoe.moe.routers.router import Choice, Router, Seen, best
from jaxmoe.moe.routers.topk import TopK

ROUTERS = {
  "topk": (TopK, TopK()),
  "sigmoid": (TopK, TopK(score="sigmoid")),
  "sqrt_softplus": (TopK, TopK(score="sqrt_softplus")),
}

__all__ = ["GATES", "ROUTERS", "Choice", "Router", "Seen", "TopK", "best"]
