"""Balance losses, as functions of summed counts and scores with one reduction point.

To add one, write its file (a record derived from `Term` with a `loss`), add one line to BALANCE,
and the contract test runs it at every scope.
"""

from jaxmoe.moe.balance.load_balance import LoadBalance, shares
from jaxmoe.moe.balance.router_z import RouterZ
from jaxmoe.moe.balance.term import Reference, Scope, Term

BALANCE = {
  "load_balance": (LoadBalance, LoadBalance()),
  "router_z": (RouterZ, RouterZ()),
}

__all__ = ["BALANCE", "LoadBalance", "Reference", "RouterZ", "Scope", "Term", "shares"]
