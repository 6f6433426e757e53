"""Cross-entropy of the next token from hidden states, from the head's weight instead of logits.

A back end is `(hidden_TD, head_weight, spec, labels_T, chunk, part) -> (nll_T, lse_T)`: each
token's negative log probability of its label, and its log-sum-exp of the logits, for a z-loss, in
float32 nats. Both are 0, with zero gradients, where the label is negative. Logits are float32 for
any type of hidden states.

  hidden_TD: The last hidden states, one row a token, already normalized.
  head_weight: The head in any weight format, or a tied embedding.
  spec: The einsum to logits: 'td,dv->tv', or 'td,vd->tv' for an embedding.
  labels_T: The right ids; negative where a token is not scored. Past the vocabulary gives NaN.
  chunk: The most tokens whose logits exist at once.
  part: Where the head's columns lie on several devices, inside `shard_map`; every device gets the
    same (T,). O(T) numbers are exchanged, never logits (Shoeybi et al. 2019, section 3).

Sizes of a need: T, D, C (the chunk); features: `PARTS`, `TIED`, `FORMAT`.
"""

from jaxmoe.core.backends import Backend, limited, unmeasured
from jaxmoe.ops.cross_entropy.all_logits import VocabShard, reference
from jaxmoe.ops.cross_entropy.chunks import chunks
from jaxmoe.ops.cross_entropy.mosaic_tpu import mosaic_tpu

PARTS, TIED, FORMAT = "parts of the vocabulary", "tied", "heads in a weight format"
"""What a need is said to have that not every back end has."""

BACKENDS: dict[str, Backend] = {
  "chunks": Backend(chunks),
  "reference": Backend(reference),
  "mosaic_tpu": Backend(
    mosaic_tpu, limited(("tpu",), (PARTS, TIED), ("bfloat16", "float32")), unmeasured
  ),
}

__all__ = [
  "BACKENDS", "FORMAT", "PARTS", "TIED", "VocabShard", "chunks", "mosaic_tpu", "reference",
]  # fmt: skip
