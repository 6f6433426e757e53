"""A recipe whose data and tokenizer are files that a test can change, and a run of it."""

import dataclasses
import pathlib
import random

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

WORDS = ("router", "expert", "token", "gate", "load", "drop", "rank", "slot", "scan", "mask")
RECIPE = """
import dataclasses
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import TextFiles
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.data.tokenizers.byte import Bytes
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.runs.recipe_loading import load_recipe

def get_config(tokenizer: str = "file"):
  tiny = load_recipe({tiny!r}, [])
  kinds = {{"file": TokenizerFile({tokenizer!r}, 300), "bpe": Bpe(280), "bytes": Bytes()}}
  data = Data((MixturePart(TextFiles({texts!r})),), kinds[tokenizer], seq_len=64)
  return dataclasses.replace(tiny, data=data)
"""


@dataclasses.dataclass(frozen=True)
class Files:
  """Where everything lies: `recipe.py`, `texts/`, `tokenizer.json`, and the run."""

  folder: pathlib.Path

  def __post_init__(self):
    self.texts.mkdir()
    for number in range(40):
      (self.texts / f"{number:02d}.txt").write_text(sentence(random.Random(number)))
    tiny = str(pathlib.Path(__file__).parents[2] / "configs" / "tiny.py")
    places = {"tiny": tiny, "tokenizer": str(self.tokenizer), "texts": str(self.texts)}
    (self.folder / "recipe.py").write_text(RECIPE.format(**places))
    self.train_tokenizer(0)

  @property
  def texts(self):
    return self.folder / "texts"

  @property
  def tokenizer(self):
    return self.folder / "tokenizer.json"

  def train_tokenizer(self, seed):
    """Writes a tokenizer; another seed, another tokenizer of the same size."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
      vocab_size=290,
      special_tokens=["<|endoftext|>"],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    )
    rng = random.Random(f"tokenizer/{seed}")
    tokenizer.train_from_iterator([sentence(rng) for _ in range(3)], trainer)
    self.tokenizer.write_text(tokenizer.to_str())

  def change_texts(self, rng):
    """Adds, removes or changes one text; returns what undoes it."""
    path = self.texts / f"{rng.randrange(40):02d}.txt"
    before, how = path.read_text(), rng.choice(("add", "remove", "change"))
    if how == "add":
      path = self.texts / "new.txt"
      path.write_text(sentence(rng))
      return path.unlink
    if how == "remove":
      path.unlink()
    else:
      place = rng.randrange(len(before))
      path.write_text(before[:place] + "#" + before[place + 1 :])
    return lambda: path.write_text(before)


def sentence(rng):
  return " ".join(rng.choices(WORDS, k=40)) + "\n"
