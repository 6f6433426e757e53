"""Four domains, routers that are trees, and a pull towards sending all domains the same way.

python -m launch.train --config=experiments/domain_fairness/recipe.py:weight=0.03,target=parity
--workdir=runs/x. With `router=topk` the gate is linear and nothing is pulled.
"""

from jaxmoe.core.config_io import component
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Synthetic
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.optim import Cosine, OnlineFairness, Optim
from jaxmoe.train.experiment import Evaluation, Experiment, Samples, Train

TASKS = ("copy", "recall", "add", "brackets")


def get_config(
  weight: float = 0.0, target: str = "parity", router: str = "tree", num_steps: int = 500
) -> Experiment:
  """Returns the recipe."""
  tasks = [Synthetic(task=task, size=6, num_documents=4000) for task in TASKS]
  moe = MoEConfig(
    num_experts=8,
    num_active=2,
    router=component(ROUTERS, "router", router),
    experts=SwiGLU(mlp_dim=64),
    balance=(LoadBalance(weight=0.01, scope="global"),),
  )
  block = BlockConfig(SoftmaxAttention(num_heads=2, num_kv_heads=2, head_dim=32), moe)
  fairness = OnlineFairness(weight=weight, target=target, decay=0.95)  # type: ignore[arg-type]
  return Experiment(
    data=Data(parts=tuple(map(MixturePart, tasks)), seq_len=128),
    model=TransformerConfig(dim=64, stack=(LayerGroup((block,), repeats=2),)),
    optim=Optim(schedule=Cosine(warmup_steps=30), learning_rate=4e-3, fairness=fairness),
    train=Train(num_steps=num_steps, batch_size=8, checkpoint_every=num_steps, log_every=100),
    evaluation=Evaluation(every=num_steps, max_bytes=20_000),
    samples=Samples(every=0),
  )
