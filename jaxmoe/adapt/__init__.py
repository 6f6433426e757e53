"""Adaptation of a trained model: low-rank updates (LoRA), and surgery on its experts."""

from jaxmoe.adapt.low_rank import LowRank, add_low_rank, merge_low_rank
from jaxmoe.adapt.surgery import Surgery, clone, insert, open_inactive, prune, upcycle
from jaxmoe.adapt.transplant import source_name, transplant_moments, transplant_params
from jaxmoe.adapt.variety import Variety

__all__ = [
  "LowRank",
  "Surgery",
  "Variety",
  "add_low_rank",
  "clone",
  "insert",
  "merge_low_rank",
  "open_inactive",
  "prune",
  "source_name",
  "transplant_moments",
  "transplant_params",
  "upcycle",
]
