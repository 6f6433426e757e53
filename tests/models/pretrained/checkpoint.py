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


def write_checkpoint(model_type, folder, dtype="float32"):
  """The model of the family's golden files, in some dtype, with a tokenizer."""
  folder.mkdir()
  shutil.copy(FOLDER / model_type / "config.json", folder)
  edit(folder, eos_token_id=0, torch_dtype=dtype)
  tensors = {
    name: x if "correction_bias" in name else x.astype(jnp.dtype(dtype))
    for name, x in safetensors.numpy.load_file(FOLDER / model_type / "model.safetensors").items()
  }
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  write_tokenizer(folder)


if __name__ == "__main__":
  write_checkpoint(sys.argv[1], pathlib.Path(sys.argv[2]))
