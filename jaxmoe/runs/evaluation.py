"""Scores of a run in bits per byte: of what it holds out, of any text, of questions."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.runs.run_loading import LoadedRun
from jaxmoe.train.evaluate import compressors, evaluate

Documents = Mapping[str, Sequence[Any]]
"""Documents by domain."""


def held_out(
  run: LoadedRun, tokenizers: pathlib.Path | None, say: Callable[[str], None]
) -> Documents:
  """Returns the documents that a run holds out, by domain.

  Args:
    run: The run.
    tokenizers: The folder of trained tokenizers; None keeps none.
    say: Called with what is read.

  Raises:
    InputError: the recipe gives other data here than the run was trained on.
  """
  corpus = open_corpus(run.experiment.data, tokenizers, progress=say)
  train = run.experiment.train
  trained_on = run.data_fingerprint  # nothing, where the run was converted
  if trained_on not in (None, corpus.fingerprint(train.batch_size, train.seed)):
    raise InputError(
      f"{run.name}: the run was trained on other data than its config gives on this "
      "machine (other files?), so what is held out may have been seen; score where it was trained"
    )
  return {name: corpus.held_out(name) for name in corpus.domains}


def score_documents(run: LoadedRun, documents: Documents, batch_size: int) -> dict[str, Any]:
  """Returns step, bits per byte of all and by domain, and those of compressors."""
  shape = (batch_size, run.experiment.data.seq_len)
  ends = run.tokenizer.start_id, run.tokenizer.eod_id
  scores = evaluate(run.decoder, run.params, documents, ends, shape)
  return {"step": run.step, **scores, "compressors": compressors(documents)}
