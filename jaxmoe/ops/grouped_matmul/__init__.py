"""Many small products as one: each row times the matrix of the slot it belongs to.

A backend is `(rows_RD, weight_SDF, sizes_S) -> out_RF`. Rows are sorted by slot: the first
`sizes_S[0]` rows belong to slot 0, the next `sizes_S[1]` to slot 1, and so on. Rows past
`sum(sizes_S)` give exact zeros and get, and give, no gradient, whatever they hold. Sums are taken
in float32, the result has the rows' type. `sizes_S` is trusted: its sum must not exceed R.
`uniform` is the special case of one size for all slots, which needs no sizes.
"""

from collections.abc import Callable

import jax

from jaxmoe.ops.grouped_matmul.blocks import blocks
from jaxmoe.ops.grouped_matmul.loop import loop
from jaxmoe.ops.grouped_matmul.ragged import ragged
from jaxmoe.ops.grouped_matmul.uniform import uniform

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

BACKENDS: dict[str, GroupedMatmul] = {"loop": loop, "ragged": ragged, "blocks": blocks}

__all__ = ["BACKENDS", "GroupedMatmul", "blocks", "loop", "ragged", "uniform"]
