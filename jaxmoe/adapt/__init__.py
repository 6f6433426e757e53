"""What changes a model that is already trained: low-rank updates of its weights."""

from jaxmoe.adapt.low_rank import LowRank, add_low_rank, merge_low_rank

__all__ = ["LowRank", "add_low_rank", "merge_low_rank"]
