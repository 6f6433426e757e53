"""The smallest recipe: exactly scorable toy tasks on bytes; what tests and first tries use.

jaxmoe train --config=tiny --workdir=runs/tiny
Any 2-core machine, 20 s, nearly all of it compiling, and 6 s once that is cached. It learns the
form of the tasks, not yet the answers.

Components by name: --config=tiny:router=topk,dispatch=capacity,attention=experts
The balance loss named takes the place of load_balance; a router that knows only one number of
experts a token is given that number. Experts are swiglu where none are named, and null or
zero_copy_constant where the balance loss is about those; a router is topk, and relu for sparsity.
"""

from typing import Final

from jaxmoe.core.config_io import component
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Synthetic
from jaxmoe.models.block import ATTENTION, BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import BALANCE, RouterZ
from jaxmoe.moe.dispatch import DISPATCHERS, EXCHANGES
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.optim import OPTIMIZERS, Cosine, Optim
from jaxmoe.train.experiment import Evaluation, Experiment, Samples, Train

EXPERTS_OF = {"null_averaged": "null", "heterogeneous": "zero_copy_constant"}
ROUTER_OF = {"sparsity": "relu"}
TASKS: Final = ("copy", "recall", "add", "brackets")


def get_config(
  attention: str = "softmax",
  router: str = "",
  experts: str = "",
  dispatch: str = "dropless",
  exchange: str = "all_to_all",
  balance: str = "load_balance",
  optimizer: str = "adamw",
) -> Experiment:
  """Returns the recipe with the named components."""
  rule = component(ROUTERS, "router", router or ROUTER_OF.get(balance, "topk"))
  term = component(BALANCE, "balance", balance)
  moe = MoEConfig(
    num_experts=4,
    num_active=rule.fixed_active or 2,
    router=rule,
    experts=component(EXPERTS, "experts", experts or EXPERTS_OF.get(balance, "swiglu")),
    dispatch=component(DISPATCHERS, "dispatch", dispatch),
    exchange=component(EXCHANGES, "exchange", exchange),
    balance=(term,) if isinstance(term, RouterZ) else (term, RouterZ()),
  )
  block = BlockConfig(component(ATTENTION, "attention", attention), moe)
  return Experiment(
    data=Data(
      parts=tuple(MixturePart(Synthetic(task=task, num_documents=400)) for task in TASKS),
      seq_len=64,
    ),
    model=TransformerConfig(dim=32, stack=(LayerGroup((block,), repeats=2),)),
    optim=Optim(component(OPTIMIZERS, "optimizer", optimizer), Cosine(warmup_steps=2)),
    train=Train(num_steps=30, batch_size=4, checkpoint_every=10, log_every=10),
    evaluation=Evaluation(every=15, max_bytes=2000, batch_size=4),
    samples=Samples(every=15, prompts=("copy",), max_tokens=16),
  )
