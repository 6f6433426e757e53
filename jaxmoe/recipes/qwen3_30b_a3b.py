"""The shape of Qwen3-30B-A3B: 128 experts of which 8 are active, 30.5B parameters, 3.3B active.

jaxmoe train --config=qwen3_30b_a3b --workdir=runs/qwen3_30b_a3b \
  --config.data.parts.0.source.path=TEXTS --config.data.tokenizer.path=tokenizer.json

Hardware: hundreds of accelerators with 80 GB. Time and score: not measured; on a
laptop the recipe builds abstractly (`get_config().decoder()`), which allocates nothing.
Source: Qwen3 technical report 2025, arXiv:2505.09388, table 2 and the released config.
"""

from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import TextFiles
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.optim import AdamW, Cosine, Optim
from jaxmoe.train.experiment import Experiment, Train


def get_config(seq_len: int = 32768) -> Experiment:
  """Returns the recipe."""
  attention = SoftmaxAttention(
    num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1_000_000.0, qk_norm="head"
  )
  moe = MoEConfig(
    num_experts=128,
    num_active=8,
    router=TopK(normalize=True),
    experts=SwiGLU(mlp_dim=768),
    balance=(LoadBalance(weight=1e-3, scope="global"),),
  )
  return Experiment(
    data=Data(
      parts=(MixturePart(TextFiles(path="data")),),
      tokenizer=TokenizerFile(path="tokenizer.json", vocab_size=151936),
      seq_len=seq_len,
    ),
    model=TransformerConfig(
      dim=2048,
      stack=(LayerGroup((BlockConfig(attention, moe),), repeats=48),),
      norm_eps=1e-6,
      dtype="bfloat16",
      remat="full",
    ),
    optim=Optim(AdamW(weight_decay=0.1), Cosine(warmup_steps=2000), learning_rate=3e-4),
    train=Train(num_steps=100_000, batch_size=128, num_micro=16),
  )
