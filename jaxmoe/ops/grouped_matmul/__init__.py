"""Many small products as one: each row times the matrix of the slot it belongs to.

A back end is `(rows_RD, weight_SDF, sizes_S) -> out_RF`. Rows are sorted by slot: the first
`sizes_S[0]` rows belong to slot 0, the next `sizes_S[1]` to slot 1, and so on. Rows past
`sum(sizes_S)` give exact zeros and get, and give, no gradient, whatever they hold. Sums are taken
in float32, the result has the rows' type. `sizes_S` is trusted: its sum must not exceed R.
`uniform` is the special case of one size for all slots, which needs no sizes.

Sizes of a need: R, S, D, F.
"""

from collections.abc import Callable

import jax

from jaxmoe.core.backends import Backend, limited, unmeasured
from jaxmoe.ops.grouped_matmul.blocks import blocks
from jaxmoe.ops.grouped_matmul.loop import loop
from jaxmoe.ops.grouped_matmul.mosaic_tpu import mosaic_tpu
from jaxmoe.ops.grouped_matmul.ragged import ragged
from jaxmoe.ops.grouped_matmul.uniform import uniform

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


BACKENDS: dict[str, Backend] = {
  "blocks": Backend(blocks, limited(("cpu", "gpu"))),  # a TPU has a kernel for ragged products
  "ragged": Backend(ragged),
  "loop": Backend(loop),
  "mosaic_tpu": Backend(mosaic_tpu, limited(("tpu",), (), ("bfloat16", "float32")), unmeasured),
}

__all__ = ["BACKENDS", "GroupedMatmul", "blocks", "loop", "mosaic_tpu", "ragged", "uniform"]
