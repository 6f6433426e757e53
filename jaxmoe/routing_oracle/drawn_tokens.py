"""Held-out tokens, each with what stands before it in its document."""

from __future__ import annotations

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import Corpus


def draw_tokens(
  corpus: Corpus, num: int, slots: int, seed: int
) -> list[tuple[np.ndarray, int]]:
  """Returns `num` held-out tokens, (ids of at most `slots` before it, its id), each another one.

  Raises:
    InputError: there are not so many.
  """
  documents = [document for name in corpus.domains for document in corpus.held_out(name)]
  start, end_id = corpus.tokenizer.start_id, corpus.tokenizer.eod_id
  texts = [
    np.concatenate([[start], document.ids, [end_id]]).astype(np.int32) for document in documents
  ]
  places = [(at, end) for at, ids in enumerate(texts) for end in range(1, len(ids))]
  if num > len(places):
    raise InputError(f"{num} are asked for, only {len(places)} tokens are held out; take fewer")
  chosen = np.random.default_rng(seed).choice(len(places), num, replace=False)
  return [
    (texts[at][max(end - slots, 0) : end], int(texts[at][end]))
    for at, end in (places[place] for place in chosen.tolist())
  ]
