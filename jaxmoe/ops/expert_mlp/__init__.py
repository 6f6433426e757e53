"""A whole expert layer for plain weights: gather, up, activation, down and weighted combine.

A backend is `(x_TD, gate_up_SDGF, down_SFD, slot_TA, weight_TA, activation) -> y_TD`. Token t is
sent to the slots `slot_TA[t]`, and y is the sum of what they make of it, times `weight_TA[t]`. G is
the number of first products: 2 for a gated layer, 1 for a plain one; `activation` is a static
function (..., G, F) -> (..., F). A slot equal to S means "no row" (a token that is not valid, a
null expert, a dropped choice): it costs nothing and contributes nothing. Nothing else is dropped.

Products are summed in float32 and rounded to x.dtype, as are the activations; the combine is
float32. Gradients flow to x, both weights and `weight_TA`.
"""

from jaxmoe.ops.expert_mlp.fused import fused
from jaxmoe.ops.expert_mlp.reference import reference

BACKENDS = {"reference": reference, "fused": fused}

__all__ = ["BACKENDS", "fused", "reference"]
