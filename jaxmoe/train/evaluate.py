"""Held-out bits per byte, by domain, and where the tokens of each domain are routed.

Bits per byte is the summed negative log2 probability of every held-out token, end of document
included, over the held-out UTF-8 bytes. Every token is scored once. A document starts without
context; a long one is cut into windows that overlap by half, in which only what no earlier window
scored counts. Short windows share a row, behind the document mask.

Of messages only the answers are scored: bits per byte is then the summed negative log2 probability
of the tokens that are learned over their UTF-8 bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.names import by_layer
from jaxmoe.core.tokens import Tokens
from jaxmoe.data.tokenizers.tokenizer import Ends
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.train.routing import routing_table

Window = tuple[np.ndarray, np.ndarray]
"""Input ids, and labels of the same length: -1 where another window scores."""


def document_windows(
  ids: np.ndarray, ends: Ends, length: int, scored_mask: np.ndarray | None = None
) -> Iterator[Window]:
  """Yields the windows of a document, each at most `length` tokens, together scoring it once.

  Where `scored_mask`, over the ids and the end of document, is false, nothing is scored; windows
  without a scored token are left out.
  """
  inputs = np.concatenate([[ends[0]], ids]).astype(np.int32)
  labels = np.concatenate([ids, [ends[1]]]).astype(np.int32)
  if scored_mask is not None:
    labels = np.where(scored_mask, labels, -1)
  stride = max(length // 2, 1)
  start, scored = 0, 0
  while scored < len(labels):
    end = min(start + length, len(labels))
    fresh = labels[start:end].copy()
    fresh[: scored - start] = -1
    if (fresh >= 0).any():
      yield inputs[start:end], fresh
    start, scored = start + stride, end


def packed_batches(
  windows: Iterator[Window], batch_size: int, length: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of full shape; a window goes into the open row if it fits, else a new one."""
  rows: list[list[Window]] = [[]]
  free = length
  for window in windows:
    size = len(window[0])
    if size > free:
      if len(rows) == batch_size:
        yield batch_of(rows, batch_size, length)
        rows = []
      rows.append([])
      free = length
    rows[-1].append(window)
    free -= size
  if rows[0]:
    yield batch_of(rows, batch_size, length)


def evaluate(
  decoder: Decoder,
  params: Params,
  domains: Mapping[str, Sequence[Any]],
  ends: Ends,
  shape: tuple[int, int],
  alive: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Returns `{bits_per_byte, domains: {name: bits_per_byte}, routing}` over the given documents.

  None stands for the bits of no byte, where nothing of a domain is scored.

  Args:
    decoder: The model.
    params: Its parameters.
    domains: Documents by domain; a document has `ids`, `scored` and `scored_bytes`.
    ends: The ids that a document starts and ends with.
    shape: (rows scored at a time, length of a window).
    alive: Called after every batch.

  `routing` has a table for each MoE layer, see `routing_table`.
  """
  bits, num_bytes, rows, labels = {}, {}, [], []
  for index, (name, documents) in enumerate(domains.items()):
    windows = (
      window
      for document in documents
      for window in document_windows(document.ids, ends, shape[1], document.scored)
    )
    nats = 0.0
    for batch in packed_batches(windows, *shape):
      nats_B, counts = jax.device_get(score_rows(decoder, params, batch))
      # Sums of a row are float32, sums of rows float64.
      nats += nats_B.sum(dtype=np.float64)
      rows.append(counts)
      labels += [index] * len(nats_B)
      alive()
    bits[name] = float(nats) / math.log(2)
    num_bytes[name] = sum(document.scored_bytes for document in documents)
  depths = rows[0] if rows else {}
  rows_RE = {depth: np.concatenate([counts[depth] for counts in rows]) for depth in depths}
  names, domain_R = tuple(domains), np.array(labels)
  tables = {str(depth): routing_table(of, domain_R, names) for depth, of in rows_RE.items()}
  return {
    "bits_per_byte": _per_byte(sum(bits.values()), sum(num_bytes.values())),
    "domains": {name: _per_byte(bits[name], num_bytes[name]) for name in domains},
    "routing": tables,
  }


def _per_byte(bits: float, num_bytes: int) -> float | None:
  return bits / num_bytes if num_bytes else None


def compressors(domains: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, float]]:
  """Returns bits per byte of gzip -9 and xz -9 on the documents of each domain as one stream.

  A domain of which only answers are scored is left out: a compressor's bits are those of all bytes.
  """
  raw = {
    name: b"".join(document.raw for document in of)
    for name, of in domains.items()
    if all(document.scored is None for document in of)
  }
  squeeze = {
    "gzip -9": lambda data: gzip.compress(data, 9),
    "xz -9": lambda data: lzma.compress(data, preset=9),
  }
  return {
    name: {domain: 8 * len(function(data)) / len(data) for domain, data in raw.items() if data}
    for name, function in squeeze.items()
  }


def first_documents(documents: Sequence[Any], max_bytes: int) -> list[Any]:
  """Returns documents, spread evenly over all, that together hold at most `max_bytes`.

  At least one is returned: the first that fits, or the smallest.
  """
  order = sorted(range(len(documents)), key=lambda i: (i * 0.6180339887498949) % 1)
  chosen, total = [], 0
  for index in order:
    if total + documents[index].num_bytes <= max_bytes:
      chosen.append(index)
      total += documents[index].num_bytes
  if not chosen:
    return [min(documents, key=lambda document: document.num_bytes)]
  return [documents[index] for index in sorted(chosen)]


@functools.partial(jax.jit, static_argnums=0)
def score_rows(
  decoder: Decoder, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, dict[int, jax.Array]]:
  """Returns (B,) float32, the summed nats of each row's scored labels, and its choices.

  Choices are (B, E) float32 by the depth of the MoE layer: how often each expert was chosen.
  """
  tokens = dataclasses.replace(Tokens.of_batch(batch), by_row=True)
  hidden_BLD, _, sums = decoder.hidden(params, tokens)
  nats_B = jnp.sum(decoder.nll(params, hidden_BLD, batch["labels"]), axis=1)
  layers = by_layer(sums, decoder.splits)
  return nats_B, {depth: of_layer.by_row.counts_E for depth, of_layer in layers.items()}


def batch_of(
  rows: list[list[Window]], batch_size: int, length: int
) -> dict[str, np.ndarray]:
  """Returns the windows of each row one after the other, as `Tokens.of_batch` reads them."""
  batch = {
    name: np.zeros((batch_size, length), np.int32) for name in ("ids", "position", "segment")
  }
  batch["labels"] = np.full((batch_size, length), -1, np.int32)
  for row, windows in enumerate(rows):
    at = 0
    for segment, (inputs, labels) in enumerate(windows, start=1):
      here = slice(at, at + len(inputs))
      batch["ids"][row, here] = inputs
      batch["labels"][row, here] = labels
      batch["position"][row, here] = np.arange(len(inputs))
      batch["segment"][row, here] = segment
      at += len(inputs)
  return batch
