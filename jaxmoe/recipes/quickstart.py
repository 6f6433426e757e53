"""A small MoE on the Python standard library of this machine; what `make quickstart` runs.

jaxmoe train --config=quickstart --workdir=runs/quickstart
Any 2-core machine, about 90 s of training when it is quiet, plus half a minute of reading and
compiling; 1.72 bits per byte on packages held out (mean of 3 seeds: 1.717, 1.736, 1.713).

On your own text: --config=quickstart:text=FOLDER, a folder of .txt, .jsonl, .json,
.parquet or .arrow files; one kind a folder, found by suffix.
"""

from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Stdlib
from jaxmoe.data.sources.auto import source_at
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.optim import AdamW, Cosine, Optim
from jaxmoe.train.experiment import Evaluation, Experiment, Samples, Train


def get_config(
  text: str = "", vocab_size: int = 2048, num_experts: int = 8, num_steps: int = 1500
) -> Experiment:
  """Returns the recipe; `text` is a folder of files to train on instead."""
  moe = MoEConfig(
    num_experts=num_experts,
    num_active=2,
    experts=SwiGLU(mlp_dim=128),
    balance=(LoadBalance(weight=0.01), RouterZ(weight=1e-3)),
  )
  block = BlockConfig(
    SoftmaxAttention(num_heads=4, num_kv_heads=4, head_dim=32, qk_norm="head"), moe
  )
  parts: tuple[MixturePart, ...] = (
    MixturePart(Stdlib(domain="code"), weight=0.96),
    MixturePart(Stdlib(domain="prose"), weight=0.02),
    MixturePart(Stdlib(domain="names"), weight=0.02),
  )
  if text:
    parts = (MixturePart(source_at(text)),)
  return Experiment(
    # The window of the shuffle covers the whole corpus: what comes last then is a sample of all.
    data=Data(
      parts=parts, tokenizer=Bpe(vocab_size=vocab_size), seq_len=128, shuffle_tokens=3_500_000
    ),
    model=TransformerConfig(dim=128, stack=(LayerGroup((block,), repeats=2),)),
    optim=Optim(
      AdamW(b2=0.98, weight_decay=0.1),
      Cosine(warmup_steps=60, final_fraction=0.1),
      learning_rate=8e-3,
    ),
    train=Train(num_steps=num_steps, batch_size=8, checkpoint_every=500, log_every=100),
    evaluation=Evaluation(every=500, max_bytes=30_000),
    samples=Samples(every=500, prompts=("def ", "import ", "The "), max_tokens=64),
  )
