"""Adam's moments in shards of ZeRO that DeepSpeed 0.19.8 wrote: against a second reading of them.

The second reading is by hand: each rank's flat parts laid one after another as DeepSpeed's layout
has it, stage 1 by group and stage 3 by parameter.
"""

import numpy as np
import pytest

from jaxmoe.checkpoint.deepspeed_zero import MOMENTS, ZeroFolder
from jaxmoe.checkpoint.torch_file import TorchFile
from tests.checkpoint.deepspeed_zero_test import GOLDEN, STEP

# The names of each group with their shapes, and where each begins in stage 1's whole.
GROUPS = ({"a.weight": (7, 3), "b.weight": (5, 7)}, {"a.bias": (7,)})


def by_hand(stage, moment):
  """Puts the parts of both ranks together without what `ZeroFolder` does."""
  found, inner = {}, {1: "base_optimizer_state", 3: "optimizer_state_dict"}[stage]
  ranks = [
    TorchFile(path).tree["optimizer_state_dict"][inner]["state"]
    for path in sorted((GOLDEN[stage] / STEP).glob("*optim_states.pt"))
  ]
  for at, group in enumerate(GROUPS):
    parts = [rank[at][moment].read() for rank in ranks]
    offset = 0
    for name, shape in group.items():
      size = int(np.prod(shape))
      if stage == 1:
        flat = np.concatenate(parts)[offset : offset + size]
        offset += size
      else:
        share = -(-size // 2)
        flat = np.concatenate([part[offset : offset + share] for part in parts])[:size]
        offset += share
      found[name] = flat.reshape(shape)
  return found


@pytest.mark.parametrize("stage", GOLDEN)
def test_moments_are_those_of_the_shards(stage):
  folder = ZeroFolder(GOLDEN[stage])
  assert (folder.count, folder.skipped) == (2, 0)
  assert {group["betas"] for group in folder.settings} == {(0.9, 0.999)}
  for moment in MOMENTS:
    true = by_hand(stage, moment)
    assert folder.moments[moment].keys() == true.keys()
    for name in true:
      found = folder.read(name, moment)
      assert found.tobytes() == true[name].tobytes() and found.any(), (name, moment)


def test_both_stages_kept_the_same_moments():
  one, three = (ZeroFolder(GOLDEN[stage]) for stage in (1, 3))
  for moment in MOMENTS:
    for name in one.tensors:
      np.testing.assert_allclose(one.read(name, moment), three.read(name, moment), rtol=1e-5)
