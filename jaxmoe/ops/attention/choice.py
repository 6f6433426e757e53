"""The choice of a back end for one call of attention, by its shapes and what is seen."""

from __future__ import annotations

from typing import Any

import jax

from jaxmoe.core.backends import Backends, Chooser
from jaxmoe.ops.attention.sight import Sight

OTHER_SIZE = "values of another size"
"""What a need is said to have whose values are not of the size of keys."""


def attend(
  chooser: Chooser, operation: tuple[str, Backends], q_BLNH: jax.Array, k_BSKH: jax.Array,
  v_BSKP: jax.Array, sight: Sight,
) -> Any:
  """Returns what the back end finds that is chosen for these arrays.

  Args:
    chooser: What chooses.
    operation: Its name and back ends.
    q_BLNH: Queries.
    k_BSKH: Keys.
    v_BSKP: Values.
    sight: What is seen.
  """  # fmt: skip
  sizes = {
    **dict(zip("BLNH", q_BLNH.shape, strict=True)),
    **dict(zip("SKP", v_BSKP.shape[1:], strict=True)),
  }
  other = {OTHER_SIZE} if sizes["H"] != sizes["P"] else set()
  backend = chooser.choose(*operation, q_BLNH.dtype, sizes, sight.features | other)
  return backend(q_BLNH, k_BSKH, v_BSKP, sight)
