"""The shape of OLMoE-1B-7B: 64 experts of which 8 are active, 6.9B parameters, 1.3B active.

jaxmoe train --config=olmoe_1b_7b --workdir=runs/olmoe_1b_7b \
  --config.data.parts.0.source.path=TEXTS --config.data.tokenizer.path=tokenizer.json

Hardware: 64 or more accelerators with 80 GB. Time and score: not measured; on a
laptop the recipe builds abstractly (`get_config().decoder()`), which allocates nothing.
Source: Muennighoff et al. 2024, arXiv:2409.02060, table 10 and the released config.
"""

from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import TextFiles
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.optim import AdamW, Cosine, Optim
from jaxmoe.train.experiment import Experiment, Train


def get_config(seq_len: int = 4096) -> Experiment:
  """Returns the recipe."""
  attention = SoftmaxAttention(
    num_heads=16, num_kv_heads=16, head_dim=128, rope_theta=10_000.0, qk_norm="all"
  )
  moe = MoEConfig(
    num_experts=64,
    num_active=8,
    router=TopK(normalize=False),
    experts=SwiGLU(mlp_dim=1024),
    balance=(LoadBalance(weight=0.01, scope="micro"), RouterZ(weight=1e-3)),
  )
  return Experiment(
    data=Data(
      parts=(MixturePart(TextFiles(path="data")),),
      tokenizer=TokenizerFile(path="tokenizer.json", vocab_size=50304),
      seq_len=seq_len,
    ),
    model=TransformerConfig(
      dim=2048,
      stack=(LayerGroup((BlockConfig(attention, moe),), repeats=16),),
      norm_eps=1e-5,
      dtype="bfloat16",
      remat="full",
    ),
    optim=Optim(AdamW(weight_decay=0.1), Cosine(warmup_steps=2000), learning_rate=4e-4),
    train=Train(num_steps=100_000, batch_size=1024, num_micro=16),
  )
