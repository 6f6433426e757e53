"""Auxiliary losses that balance load, as functions of summed counts with one reduction point.

To add one, write its file (a record derived from `AuxLoss` with a `loss`), add one line to BALANCE,
and the contract test runs it at every scope.
"""

from jaxmoe.moe.balance.aux_loss import AuxLoss, Scope, StepTotals
from jaxmoe.moe.balance.information import LoadConcentration, MutualInformation
from jaxmoe.moe.balance.latency import LatencyAware
from jaxmoe.moe.balance.load_balance import Heterogeneous, LoadBalance, NullAveraged
from jaxmoe.moe.balance.router_z import RouterZ
from jaxmoe.moe.balance.sparsity import Sparsity

BALANCE = {
  "load_balance": (LoadBalance, LoadBalance()),
  "router_z": (RouterZ, RouterZ()),
  "mutual_information": (MutualInformation, MutualInformation()),
  "load_concentration": (LoadConcentration, LoadConcentration()),
  "null_averaged": (NullAveraged, NullAveraged()),
  "heterogeneous": (Heterogeneous, Heterogeneous()),
  "latency_aware": (LatencyAware, LatencyAware()),
  "sparsity": (Sparsity, Sparsity()),
}

__all__ = [
  "BALANCE",
  "AuxLoss",
  "Heterogeneous",
  "LatencyAware",
  "LoadBalance",
  "LoadConcentration",
  "MutualInformation",
  "NullAveraged",
  "RouterZ",
  "Scope",
  "Sparsity",
  "StepTotals",
]
