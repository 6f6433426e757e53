"""A whole expert layer for plain weights: gather, up, activation, down and weighted combine.

A back end is `(x_TD, gate_up_SDGF, down_SFD, slot_TA, weight_TA, activation, among, matmul) ->
y_TD`. Token t is sent to the slots `slot_TA[t]`, and y is the sum of what they make of it, times
`weight_TA[t]`. G is the number of first products: 2 for a gated layer, 1 for a plain one;
`activation` is a static function (..., G, F) -> (..., F). A slot equal to S means "no row" (a token
that is not valid, a null expert, a dropped choice): it costs nothing and contributes nothing.
Nothing else is dropped. `among` is over how many slots the choices are spread, S if None: more
where some of them are meant to have no row. `matmul` is a back end of `grouped_matmul`.

Products are summed in float32 and rounded to x.dtype, as are the activations; the combine is
float32. Gradients flow to x, both weights and `weight_TA`.

Sizes of a need: T, A, S, D, G, F.
"""

from jaxmoe.core.backends import Backend, limited
from jaxmoe.ops.expert_mlp.few import few, few_choices
from jaxmoe.ops.expert_mlp.fused import fused
from jaxmoe.ops.expert_mlp.reference import reference
from jaxmoe.ops.expert_mlp.sorted_rows import sorted_rows

BACKENDS: dict[str, Backend] = {
  "few": Backend(few, limited(("cpu",)), auto=few_choices),
  "fused": Backend(fused, limited(("cpu", "gpu"))),  # its loop is of small products, one by one
  "rows": Backend(sorted_rows),
  "reference": Backend(reference),
}

__all__ = ["BACKENDS", "few", "fused", "reference", "sorted_rows"]
