"""Stick-breaking attention: near keys take their share first, without softmax or positions.

ModuleFormer, Shen et al. 2023, section 2.2. Each query breaks a stick of length 1 along its keys,
the last first: key j takes the share beta_ij = sigmoid(z_ij) of what keys after it have left,
A_ij = beta_ij prod_{l>j} (1 - beta_il), with z_ij = scale q_i k_j and l up to i itself. The shares
sum to at most 1.

A back end is `(q_BLNH, k_BSKH, v_BSKP, sight) -> StickPart`, as in `ops/attention`, for keys in
order of time. Sizes and features of a need are the same, too.
"""

from jaxmoe.core.backends import Backend, limited, unmeasured
from jaxmoe.ops.attention.choice import OTHER_SIZE
from jaxmoe.ops.attention.tpu_walk import fits_tpu
from jaxmoe.ops.stick_breaking.blocks import blocks
from jaxmoe.ops.stick_breaking.mosaic_tpu import mosaic_tpu
from jaxmoe.ops.stick_breaking.reference import reference
from jaxmoe.ops.stick_breaking.stick_algebra import STICK_PARTS
from jaxmoe.ops.stick_breaking.stick_part import StickPart, merge

BACKENDS: dict[str, Backend] = {
  "blocks": Backend(blocks, limited(features=(OTHER_SIZE,))),
  "reference": Backend(reference),
  "mosaic_tpu": Backend(mosaic_tpu, fits_tpu((OTHER_SIZE,)), unmeasured),
}

__all__ = ["BACKENDS", "STICK_PARTS", "StickPart", "blocks", "merge", "mosaic_tpu", "reference"]
