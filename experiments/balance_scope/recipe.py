"""Four domains, four MoE layers of eight experts, and balance over a row or over the whole step.

python -m launch.train --config=experiments/balance_scope/recipe.py:scope=global --workdir=runs/x
With `mixed=FILE.jsonl`, documents of all domains in random order, a row holds all domains; what is
scored, domain by domain, stays the same. `runs.py` makes the file.
"""

from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Jsonl, Synthetic
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.optim import Cosine, Optim
from jaxmoe.train.experiment import Evaluation, Experiment, Samples, Train

TASKS = ("copy", "recall", "add", "brackets")
SIZE = 6
NUM_DOCUMENTS = 8000


def get_config(scope: str = "global", mixed: str = "", num_steps: int = 1000) -> Experiment:
  """Returns the recipe; a row is the smallest microbatch there is, one sequence on one device."""
  tasks = [Synthetic(task=task, size=SIZE, num_documents=NUM_DOCUMENTS) for task in TASKS]
  parts = tuple(MixturePart(task, weight=1e-6 if mixed else 1.0) for task in tasks)
  if mixed:
    parts = (MixturePart(Jsonl(path=mixed, domain="mixed")), *parts)
  moe = MoEConfig(
    num_experts=8,
    num_active=2,
    experts=SwiGLU(mlp_dim=64),
    balance=(LoadBalance(weight=0.02, scope=scope), RouterZ()),
  )
  block = BlockConfig(SoftmaxAttention(num_heads=2, num_kv_heads=2, head_dim=32), moe)
  return Experiment(
    data=Data(parts=parts, seq_len=128),
    model=TransformerConfig(dim=64, stack=(LayerGroup((block,), repeats=4),)),
    optim=Optim(schedule=Cosine(warmup_steps=50), learning_rate=4e-3),
    train=Train(num_steps=num_steps, batch_size=8, checkpoint_every=num_steps, log_every=200),
    evaluation=Evaluation(every=num_steps, max_bytes=20_000),
    samples=Samples(every=0),
  )
