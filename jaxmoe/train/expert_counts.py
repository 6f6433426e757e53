"""Expert load: how often each expert was chosen, a row a MoE layer; counted, or from a file."""

from __future__ import annotations

import collections
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import Corpus
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.train.evaluate import document_windows, score_rows
from jaxmoe.train.row_packing import packed_batches
from jaxmoe.train.run_log import read_lines

ExpertCounts = list[np.ndarray]
"""(E,) float64 of each MoE layer, by depth."""

LINES = 100
"""Lines of metrics.jsonl, the last ones, over which loads are averaged."""


def count_experts(
  decoder: Decoder, params: Params, batches: Iterable[Mapping[str, Any]]
) -> ExpertCounts:
  """Returns the choices of all valid tokens of some batches, before any drop."""
  total: collections.Counter[int] = collections.Counter()
  for batch in batches:
    _, counts = jax.device_get(score_rows(decoder, params, dict(batch)))
    total.update({depth: of.sum(axis=0, dtype=np.float64) for depth, of in counts.items()})
  return [np.asarray(total[depth]) for depth in sorted(total)]


def held_out_batches(corpus: Corpus, shape: tuple[int, int]) -> Iterator[Mapping[str, Any]]:
  """Yields batches of `shape` of held-out documents, one of each domain in turn."""
  ends = corpus.tokenizer.start_id, corpus.tokenizer.eod_id
  in_turn = itertools.zip_longest(*(corpus.held_out(name) for name in corpus.domains))
  windows = (
    window
    for documents in in_turn
    for document in documents
    if document is not None
    for window in document_windows(
      document.ids, ends, shape[1], document.scored
    )
  )
  return packed_batches(windows, *shape)


def read_expert_counts(path: str) -> ExpertCounts:
  """Returns the usage in a file.

  Args:
    path: An .npy of (layers, E), a .json of such lists, or the metrics.jsonl of a run, whose loads
      are averaged over the last `LINES` lines.

  Raises:
    InputError: the file cannot be read, or holds something else.
  """
  try:
    return [np.asarray(row, np.float64).reshape(len(row)) for row in _rows(pathlib.Path(path))]
  except OSError as error:
    raise InputError(f"--usage={path}: cannot be read ({error.strerror}); give counts") from None
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise InputError(
      f"--usage={path}: holds no counts ({error}); give a list of numbers for each MoE layer as "
      ".json or .npy, or a run's metrics.jsonl"
    ) from None


def _rows(path: pathlib.Path) -> Sequence[Any]:
  if path.suffix == ".npy":
    return list(np.load(path, allow_pickle=False))
  if path.suffix == ".json":
    return json.loads(path.read_text(encoding="utf-8-sig"))
  if path.suffix != ".jsonl":
    raise ValueError("of no kind known")
  path.stat()  # raises where there is none
  last = collections.deque((line["layers"] for line in read_lines(path)), LINES)
  if not last:
    raise ValueError("no whole line")
  depths = sorted(last[0], key=int)
  return [np.mean([line[depth]["load"] for line in last], axis=0) for depth in depths]
