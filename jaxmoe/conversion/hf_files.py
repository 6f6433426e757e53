"""Files of a Hugging Face checkpoint that go along both ways, its folders, and progress."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from jaxmoe.core.errors import InputError, UserFacingError
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.pretrained.dtypes import Dtypes
from jaxmoe.train.run_store import is_trained
from jaxmoe.train.workdir import Workdir

FOLDER = "pretrained"
"""Below the workdir."""

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
DTYPES = "dtypes.json"
CARRIED = (
  GENERATION, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
  "chat_template.json",
)  # fmt: skip
"""What is copied as it is; nothing of it is ever run."""


_EVERY_S = 5.0


@dataclasses.dataclass(frozen=True)
class Origin:
  """Files that a model has beside its weights.

  Attributes:
    folder: What came with it, of the checkpoint it was made of; may not exist.
    tokenizer: The file of its tokenizer.
    trained: Whether it was trained here.
    dtypes: Of the tensors it was made of; None for what a file in the folder says.
  """

  folder: pathlib.Path
  tokenizer: pathlib.Path
  trained: bool = False
  dtypes: Dtypes | None = None


def origin_of(workdir: Workdir) -> Origin:
  """Returns what a run has beside its weights."""
  return Origin(workdir.path / FOLDER, workdir.tokenizer, is_trained(workdir))


def copy_files(source: pathlib.Path, target: pathlib.Path, names: tuple[str, ...]) -> list[str]:
  """Copies those files that are there; returns their names."""
  found = [name for name in names if (source / name).is_file()]
  for name in found:
    shutil.copyfile(source / name, target / name)
  return found


def carry(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what one run has of the checkpoint that it came from to another, if it came from one."""
  if (source / FOLDER).is_dir():
    (target / FOLDER).mkdir()
    copy_files(source / FOLDER, target / FOLDER, (CONFIG, DTYPES, *CARRIED))


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """Returns a JSON object of a file, an empty one where there is no file.

  Raises:
    InputError: it is there and holds none.
  """
  try:
    plain = json.loads(path.read_text(encoding="utf-8-sig"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: cannot be read ({error}); restore the file") from None
  if not isinstance(plain, dict):
    raise InputError(f"{path}: holds no object; restore the file")
  return plain


def tokenizer_of(folder: pathlib.Path, vocab_size: int, eod: str | None) -> TokenizerFile:
  """Returns the tokenizer in a checkpoint's folder.

  Args:
    folder: The checkpoint.
    vocab_size: Of its model.
    eod: The token that ends a document; None for the first `eos_token_id` of the config.

  Raises:
    InputError: no tokenizer.json, or no such token.
  """
  path = folder / TOKENIZER
  if not path.is_file():
    raise InputError(
      f"{path}: no such file; write it with transformers, "
      "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )
  if eod is None:
    eod = _end(folder)
  record = TokenizerFile(str(path), vocab_size, eod, _start(path))
  record.build((), "", None, lambda line: None)  # its checks
  return record


def _end(folder: pathlib.Path) -> str:
  """Returns the token that ends a document, as the tokenizer spells it."""
  for name in (CONFIG, GENERATION):
    found = read_object(folder / name).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if ids and isinstance(ids[0], int):
      return _spelt(folder / TOKENIZER, ids[0])
  named = read_object(folder / "tokenizer_config.json").get("eos_token")
  named = named.get("content") if isinstance(named, dict) else named
  if not isinstance(named, str):
    raise InputError(f"{folder}: no eos_token_id says what ends a document; give --eod=TOKEN")
  return named


def _start(path: pathlib.Path) -> str | None:
  """Returns the token that a tokenizer puts before every text of its own accord, if any."""
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise InputError(f"{path}: not a tokenizer.json ({error}); write it again") from None
  tokenizer.no_padding()  # which a fine-tune may have left on, and which makes all texts alike
  tokenizer.no_truncation()
  plain, whole = (tokenizer.encode("a", add_special_tokens=of).ids for of in (False, True))
  starts = len(whole) > len(plain) and whole[1 : 1 + len(plain)] == plain
  return tokenizer.id_to_token(whole[0]) if starts else None


def _spelt(path: pathlib.Path, token_id: int) -> str:
  try:
    spelt = tokenizers.Tokenizer.from_file(str(path)).id_to_token(token_id)
  except Exception as error:  # the library raises bare Exception
    raise InputError(f"{path}: not a tokenizer.json ({error}); write it again") from None
  if spelt is None:
    raise InputError(f"{path}: has no token of the id {token_id} (eos_token_id); give --eod=TOKEN")
  return spelt


def end_ids(folder: pathlib.Path) -> frozenset[int]:
  """Returns the ids at which a model stops writing, as generation_config.json has them."""
  found = read_object(folder / GENERATION).get("eos_token_id")
  ids = found if isinstance(found, list) else [found]
  return frozenset(one for one in ids if isinstance(one, int))


@contextlib.contextmanager
def folder_for(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder that becomes `path` if all goes well, and is gone if not."""
  half = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    half.mkdir(parents=True)
    yield half
    half.rename(path)
  except UserFacingError as error:  # which may name a folder that is gone
    raise type(error)(str(error).replace(str(half), str(path))) from None
  except OSError as error:
    raise InputError(f"{path}: cannot be written ({error.strerror}); choose another") from None
  finally:
    shutil.rmtree(half, ignore_errors=True)


class Progress:
  """Says how far a conversion is, and how fast: a line every few seconds, and one at the end."""

  def __init__(self, total: int, say: Callable[[str], None]):
    self._total, self._done, self._say = total, 0, say
    self._start = self._reported_at = time.monotonic()

  def add(self, num_bytes: int) -> None:
    """Counts what was converted."""
    self._done += num_bytes
    if time.monotonic() - self._reported_at >= _EVERY_S:
      self._report()

  def end(self) -> None:
    """Tells the whole."""
    self._report()

  def _report(self) -> None:
    self._reported_at = time.monotonic()
    speed = self._done / max(self._reported_at - self._start, 1e-9) / 1e6
    self._say(
      f"converted {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {speed:,.0f} MB/s"
    )
