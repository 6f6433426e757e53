"""Forward and backward passes side by side: what one half exchanges waits for nothing of the other.

A walk of the compiled program: an FB pass is a branch in which both halves send rows to experts.
"""

import pytest

from jaxmoe.hlo.text import parse_program
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import Parallel
from jaxmoe.train.pipeline_stages import placed_groups
from tests.multidevice.programs import lower_gradients

BLOCK = BlockConfig(
  SoftmaxAttention(2, 1, 8), MoEConfig(4, 2, ROUTERS["topk"][1], SwiGLU(mlp_dim=16))
)
MICRO, VOCAB = 4, 32


def before(computation, name):
  """Returns the instructions that one waits for."""
  found, waiting = set(), [name]
  while waiting:
    for operand in computation[waiting.pop()].operands:
      if operand in computation and operand not in found:
        found.add(operand)
        waiting.append(operand)
  return found


def halves(computation, keep):
  """Returns the exchanges of a computation that is a branch, forward and backward ones.

  A backward half begins with its stage's forward pass where inputs are kept.
  """
  scope = {"input": "jvp(", "residuals": "transpose("}[keep]
  found = [each for each in computation.values() if each.opcode == "all-to-all"]
  back = {each.name for each in found if scope in each.scope}
  return {each.name for each in found} - back, back


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["input", "residuals"])
def test_exchanges_of_both_halves_do_not_wait_for_each_other(keep):
  parallel = Parallel(pipe=2, expert=2, pipeline="dualpipe_v", keep=keep)
  config = TransformerConfig(dim=16, stack=(LayerGroup((BLOCK,), 4),), scan=False)
  decoder = Decoder(config, VOCAB, layer_groups=placed_groups(parallel, config, VOCAB))
  lowered, _ = lower_gradients(decoder, parallel, (2 * MICRO, 8), MICRO)
  program, pairs = parse_program(lowered.compile().as_text()), 0
  for computation in program.computations.values():
    ahead, back = halves(computation, keep)
    pairs += bool(ahead and back)
    for mine, other in ((ahead, back), (back, ahead)):
      waits = {name: before(computation, name) for name in mine}
      assert not any(earlier & other for earlier in waits.values())
      # What comes back from experts does wait for what was sent to them.
      assert not mine or any(earlier & mine for earlier in waits.values())
  # As many pairs of stages does the table have side by side; where inputs are kept the last stage
  # does nothing in its forward half.
  assert pairs == {"input": 3, "residuals": 4}[keep]
