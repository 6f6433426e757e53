"""Small corpora for the tests of data."""

import random

import numpy as np
import pytest

from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.text_files import TextFiles


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
  parts = (MixturePart(TextFiles(low, "low"), 3.0), MixturePart(TextFiles(high, "high"), 1.0))
  return Data(parts, seq_len=16, held_out=0.2)


@pytest.fixture
def write_rows(tmp_path):
  """Returns a function that writes a column as .parquet, .arrow (file) or .stream.arrow.

  `column` is a list of values or an Arrow array; `group` is the rows of a row group or batch.
  """
  pa = pytest.importorskip("pyarrow", reason="needs the extra: pip install 'jaxmoe[data]'")
  import pyarrow.ipc
  import pyarrow.parquet

  def write(name, column, field="text", group=4, folder="rows", **others):
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({field: column, **others})
    if name.endswith(".parquet"):
      pyarrow.parquet.write_table(table, path, row_group_size=group)
    else:
      new = pa.ipc.new_stream if ".stream." in name else pa.ipc.new_file
      with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=group)
    return str(path.parent)

  return write


@pytest.fixture
def bytes_as_strings():
  """Returns a function from bytes (None for null) to a string array that holds them unchecked."""
  pa = pytest.importorskip("pyarrow", reason="needs the extra: pip install 'jaxmoe[data]'")

  def make(values):
    sizes = [0 if value is None else len(value) for value in values]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    valid = pa.array([value is not None for value in values]).buffers()[1]
    data = pa.py_buffer(b"".join(value or b"" for value in values))
    buffers = [valid, pa.py_buffer(offsets.tobytes()), data]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)

  return make
