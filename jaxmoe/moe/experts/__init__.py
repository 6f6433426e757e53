"""Experts: rows in, rows out. An expert family is a record; `build` gives its weights.

To add one, write its file, add one line to EXPERTS, and the contract test runs it. NETWORKS are
those of one kind, which other families are made of.
"""

from jaxmoe.moe.experts.homogeneous import NETWORKS
from jaxmoe.moe.experts.latent import Latent
from jaxmoe.moe.experts.mixed_primitives import Primitives
from jaxmoe.moe.experts.multi_width import Duo
from jaxmoe.moe.experts.null import Null
from jaxmoe.moe.experts.swiglu import SwiGLU
from jaxmoe.moe.experts.zero_copy_constant import ZeroCopyConstant

_SMALL = SwiGLU(mlp_dim=32)
EXPERTS = {
  **NETWORKS,
  "null": (Null, Null(_SMALL, num_null=2)),
  "zero_copy_constant": (ZeroCopyConstant, ZeroCopyConstant(_SMALL)),
  "duo": (Duo, Duo(widths=(32, 32, 8, 0))),
  "primitives": (
    Primitives, Primitives(mlp_dim=32, kinds=("dense", "shift", "low_rank", "identity"), rank=2)
  ),
  "latent": (Latent, Latent(_SMALL, dim=16)),
}

__all__ = ["EXPERTS", "NETWORKS", "SwiGLU"]
