"""The shape of Mixtral-8x7B: 8 experts of which 2 are active, 46.7B parameters, 12.9B active.

jaxmoe train --config=mixtral_8x7b --workdir=runs/mixtral_8x7b \
  --config.data.parts.0.source.path=TEXTS --config.data.tokenizer.path=tokenizer.json

Hardware: hundreds of accelerators with 80 GB. Time and score: not measured; on a
laptop the recipe builds abstractly (`get_config().decoder()`), which allocates nothing.
Source: Jiang et al. 2024, arXiv:2401.04088, table 1 and the released config.
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
    num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1_000_000.0, qk_norm="none"
  )
  moe = MoEConfig(
    num_experts=8,
    num_active=2,
    router=TopK(normalize=True),
    experts=SwiGLU(mlp_dim=14336),
    balance=(LoadBalance(weight=0.02, scope="micro"),),
  )
  return Experiment(
    data=Data(
      parts=(MixturePart(TextFiles(path="data")),),
      tokenizer=TokenizerFile(path="tokenizer.json", vocab_size=32000),
      seq_len=seq_len,
    ),
    model=TransformerConfig(
      dim=4096,
      stack=(LayerGroup((BlockConfig(attention, moe),), repeats=32),),
      norm_eps=1e-5,
      dtype="bfloat16",
      remat="full",
    ),
    optim=Optim(AdamW(weight_decay=0.1), Cosine(warmup_steps=2000), learning_rate=3e-4),
    train=Train(num_steps=100_000, batch_size=128, num_micro=16),
  )
