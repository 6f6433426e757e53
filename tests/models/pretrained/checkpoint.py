"""Makes a checkpoint folder of a tiny random model of a family, for tests and first tries.

python -m tests.models.pretrained.checkpoint olmoe /tmp/olmoe
"""

import json
import pathlib
import shutil
import sys

import jax.numpy as jnp
import safetensors.numpy
import tokenizers

from tests.models.pretrained.golden import FOLDER

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.()=_:\n"


def write_tokenizer(folder):
  """A tokenizer.json of single characters, 37 of 61 ids."""
  vocab = {"<|end|>": 0, "<unk>": 1, **{letter: 2 + at for at, letter in enumerate(LETTERS)}}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(r"[\s\S]"), "isolated"
  )
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.add_special_tokens(["<|end|>"])
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')


def edit(folder, **changes):
  """Changes keys of the config."""
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors_of(folder):
  """All tensors of a checkpoint by name."""
  return {
    name: x for path in sorted(folder.glob("model*.safetensors"))
    for name, x in safetensors.numpy.load_file(path).items()
  }  # fmt: skip


def bits(tensors):
  """What is equal for tensors that are equal bit for bit."""
  return {name: (x.dtype.name, x.shape, x.tobytes()) for name, x in tensors.items()}


def write_checkpoint(model_type, folder, dtype="float32"):
  """The model of the family's golden files, in some dtype or `mixed`, with a tokenizer."""
  folder.mkdir()
  shutil.copy(FOLDER / model_type / "config.json", folder)
  edit(folder, eos_token_id=0, torch_dtype="float32" if dtype == "mixed" else dtype)
  tensors = {
    name: x.astype(_dtype_of(name, dtype))
    for name, x in safetensors.numpy.load_file(FOLDER / model_type / "model.safetensors").items()
  }
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  write_tokenizer(folder)


def _dtype_of(name, dtype):
  """The dtype of a tensor; of two that make one weight they may be two."""
  if dtype != "mixed":
    return jnp.dtype("float32" if "correction_bias" in name else dtype)
  if "correction_bias" in name or "embed_tokens" in name:
    return jnp.dtype("bfloat16")
  return jnp.dtype("float16" if "experts.1." in name or "kv_b_proj" in name else "float32")


if __name__ == "__main__":
  write_checkpoint(sys.argv[1], pathlib.Path(sys.argv[2]))
