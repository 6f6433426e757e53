"""Top-k: a token goes to the A experts with the best scores (Shazeer et al. 2017, section 2.1).

With `normalize` the weights are the scores of the chosen experts over their sum; of a softmax
that equals a softmax over the chosen logits alone (Mixtral, Qwen3). Without it they are the
scores themselves (OLMoE; Switch with num_active=1; GShard normalises and has num_active=2).
"""

from __future__ import annotations

import dataclasses

from jaxmoe.moe.routers.router import Choice, Router, Seen, best


@dataclasses.dataclass(frozen=True)
class TopK(Router):
  """The A best by score; token-local."""

  def choose(self, seen: Seen) -> Choice:
    """Routes each token by itself; ties go to the lower expert."""
    expert_TA = best(seen.scores_TE, seen.num_active)
    return Choice(expert_TA, self.weigh(seen.scores_TE, expert_TA))
