"""Pretrained models of others: checkpoints in the names and keys of transformers, in and out.

A family is one file: how its config.json becomes our record and back, and the names of its weights.
To add one, write the file and its line in FAMILIES; the contract test compares it with files that
transformers wrote (`tests/models/pretrained/golden.py` makes them).

config_reader.py       config.json, read key by key
tensor_mapping.py      where each weight lies in a checkpoint, as data read in both directions
checkpoint_files.py    the safetensors of a checkpoint
safetensors_writer.py  writing them
casting.py             casting what is written to another dtype
origin.py              config.json of a model that came with one
checkpoint.py          a folder whose config, names and shapes fit each other
dtypes.py              which dtype each tensor had, kept beside a run
config_keys.py         keys of config.json that families share
rope_config.py         RoPE scaling, both ways
shared_mappings.py     mappings of parameters that families share
model_family.py        what a family is
"""

from jaxmoe.models.pretrained.deepseek_v2 import DEEPSEEK_V2
from jaxmoe.models.pretrained.deepseek_v3 import DEEPSEEK_V3
from jaxmoe.models.pretrained.gpt_oss import GPT_OSS
from jaxmoe.models.pretrained.granitemoe import GRANITEMOE
from jaxmoe.models.pretrained.llama import LLAMA
from jaxmoe.models.pretrained.mixtral import MIXTRAL
from jaxmoe.models.pretrained.model_family import ModelFamily
from jaxmoe.models.pretrained.olmoe import OLMOE
from jaxmoe.models.pretrained.phimoe import PHIMOE
from jaxmoe.models.pretrained.qwen2_moe import QWEN2_MOE
from jaxmoe.models.pretrained.qwen3 import QWEN3
from jaxmoe.models.pretrained.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, ModelFamily] = {
  "deepseek_v2": DEEPSEEK_V2,
  "deepseek_v3": DEEPSEEK_V3,
  "gpt_oss": GPT_OSS,
  "granitemoe": GRANITEMOE,
  "llama": LLAMA,
  "mixtral": MIXTRAL,
  "olmoe": OLMOE,
  "phimoe": PHIMOE,
  "qwen2_moe": QWEN2_MOE,
  "qwen3": QWEN3,
  "qwen3_moe": QWEN3_MOE,
}

__all__ = ["FAMILIES", "ModelFamily"]
