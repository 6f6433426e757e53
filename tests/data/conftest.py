"""Small corpora for the tests of data."""

import random

import pytest

from jaxmoe.data.mixture import Data, Part
from jaxmoe.data.sources.text import Text


@pytest.fixture
def write_texts(tmp_path):
  """Returns a function that writes {name: text or bytes} below tmp_path and returns the folder."""

  def write(texts, folder="texts"):
    for name, text in texts.items():
      path = tmp_path / folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(tmp_path / folder)

  return write


@pytest.fixture
def some_texts():
  """Returns a function that makes `number` different documents of 1 to 80 letters out of `letters`.

  The first two characters number the document, so that no two are equal.
  """

  def make(number, letters="abcdefgh", seed=0):
    draw = random.Random(f"{letters}/{seed}")
    texts = {}
    for i in range(number):
      body = "".join(letters[int(draw.random() * len(letters))] for _ in range(1 + (i * 7) % 79))
      texts[f"{letters[0]}{i:03d}.txt"] = f"{letters[i % 8]}{letters[i // 8 % 8]}{body}"
    return texts

  return make


@pytest.fixture
def two_domains(write_texts, some_texts):
  """Returns the recipe of two text domains with disjoint letters, weights 3 and 1."""
  low = write_texts(some_texts(24, "abcdefgh"), "low")
  high = write_texts(some_texts(20, "STUVWXYZ"), "high")
  parts = (Part(Text(low, "low"), 3.0), Part(Text(high, "high"), 1.0))
  return Data(parts, seq_len=16, held_out=0.2)
