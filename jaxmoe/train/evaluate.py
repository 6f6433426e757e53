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

from jaxmoe.core.param_names import by_layer
from jaxmoe.core.tokens import Tokens
from jaxmoe.data.document import without_start_id
from jaxmoe.data.tokenizers.tokenizer import BoundaryIds
from jaxmoe.models.masks import DocumentMask, WindowMask
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.moe.routers.forced import Forced
from jaxmoe.train.domain_routing import routing_table
from jaxmoe.train.row_packing import Window, fitted_batches, packed_batches

Domains = Mapping[str, Sequence[Any]]
"""Documents by domain; a document has `ids`, `scored` and `scored_bytes`."""
Batches = Iterator[tuple[dict[str, np.ndarray], np.ndarray]]


def document_windows(
  ids: np.ndarray, ends: BoundaryIds, length: int, scored_mask: np.ndarray | None = None
) -> Iterator[Window]:
  """Yields the windows of a document, each at most `length` tokens, together scoring it once.

  Where `scored_mask`, over the ids and the end of document, is false, nothing is scored; windows
  without a scored token are left out.
  """
  ids, scored_mask = without_start_id(ids, scored_mask, ends[0])
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


def evaluate(
  decoder: Decoder,
  params: Params,
  domains: Domains,
  ends: BoundaryIds,
  shape: tuple[int, int],
  alive: Callable[[], None] = lambda: None,
  fitted: bool = True,
) -> dict[str, Any]:
  """Returns `{bits_per_byte, domains: {name: bits_per_byte}, routing}` over the given documents.

  None stands for the bits of no byte, where nothing of a domain is scored.

  Args:
    decoder: The model.
    params: Its parameters.
    domains: The documents.
    ends: The ids that a document starts and ends with.
    shape: (rows scored at a time, length of a window); with `fitted` the most of both.
    alive: Called after every batch.
    fitted: Whether batches have shapes that fit the documents, where that changes no score.

  `routing` has a table for each MoE layer, see `routing_table`.
  """
  nats, rows, labels = np.zeros(len(domains)), [], []
  domain_sums = [_windows(documents, ends, shape[1]) for documents in domains.values()]
  if fitted and scored_alone(decoder.config):
    batches = _fitted(domain_sums, shape, least_row(decoder.config, shape[1]))
  else:
    batches = _packed(domain_sums, shape)
  for batch, domain_R in batches:
    nats_B, counts = jax.device_get(score_rows(decoder, params, batch))
    nats_R = nats_B[: len(domain_R)]
    for index in np.unique(domain_R):
      # Sums of a row are float32, sums of rows float64.
      nats[index] += nats_R[domain_R == index].sum(dtype=np.float64)
    rows.append({depth: of_layer[: len(domain_R)] for depth, of_layer in counts.items()})
    labels.append(domain_R)
    alive()
  bits = dict(zip(domains, (nats / math.log(2)).tolist()))
  num_bytes = {
    name: sum(document.scored_bytes for document in documents)
    for name, documents in domains.items()
  }
  depths = rows[0] if rows else {}
  rows_RE = {depth: np.concatenate([counts[depth] for counts in rows]) for depth in depths}
  names, domain_R = tuple(domains), np.concatenate([*labels, np.zeros(0, int)])
  tables = {str(depth): routing_table(of, domain_R, names) for depth, of in rows_RE.items()}
  return {
    "bits_per_byte": _per_byte(sum(bits.values()), sum(num_bytes.values())),
    "domains": {name: _per_byte(bits[name], num_bytes[name]) for name in domains},
    "routing": tables,
  }


def _per_byte(bits: float, num_bytes: int) -> float | None:
  return bits / num_bytes if num_bytes else None


def _windows(documents: Sequence[Any], ends: BoundaryIds, length: int) -> Iterator[Window]:
  """Yields the windows of all documents."""
  for document in documents:
    yield from document_windows(document.ids, ends, length, document.scored)


def _packed(domain_sums: list[Iterator[Window]], shape: tuple[int, int]) -> Batches:
  """Yields batches of `shape`, each of one domain, and the domain of each of their rows."""
  for index, windows in enumerate(domain_sums):
    for batch in packed_batches(windows, *shape):
      yield batch, np.full(shape[0], index)


def _fitted(domain_sums: list[Iterator[Window]], shape: tuple[int, int], least: int) -> Batches:
  """Yields batches of shapes that fit, and the domain of each of their rows that has one."""
  items = ((index, window) for index, windows in enumerate(domain_sums) for window in windows)
  for batch, rows in fitted_batches(items, shape, least):
    yield batch, np.array([row[0][0] for row in rows])


def scored_alone(model: TransformerConfig) -> bool:
  """Whether what a window gets does not depend on what lies in its row and batch beside it."""
  routers = [part.router for part in _parts(model) if hasattr(part, "router")]
  placed = any(isinstance(router, Forced) or getattr(router, "always", False) for router in routers)
  limited = any(moe.dispatch.depends_on_shard for moe in model.moe_records())
  masks = [heads.mask for heads in _heads(model)]
  return not (placed or limited) and all(
    isinstance(mask, (DocumentMask, WindowMask)) for mask in masks
  )


def least_row(model: TransformerConfig, length: int) -> int:
  """Returns the shortest row in which a model computes what it does in rows of `length`."""
  ropes = [heads.rope for heads in _heads(model) if hasattr(heads, "rope")]
  return max([1, *(rope.least_alike(length) for rope in ropes)])


def _parts(model: TransformerConfig) -> list[Any]:
  """Returns the records of attention and of feed-forward parts."""
  blocks = [block for group in model.stack for block in group.pattern]
  return [part for block in blocks for part in (block.attention, block.ffn)]


def _heads(model: TransformerConfig) -> list[Any]:
  """Returns the records that say what a token sees."""
  attention = _parts(model)[::2]
  return [getattr(of, "heads", of) for of in attention]


def compressors(
  domains: Domains, among: Domains | None = None, most: int = 1 << 20
) -> dict[str, dict[str, float]]:
  """Returns bits per byte of gzip -9 and xz -9 on the documents of each domain as one stream.

  A domain of which only answers are scored is left out: a compressor's bits are those of all bytes.

  Args:
    domains: The documents.
    among: Those that they are a slice of. A short stream by itself says little of a compressor, so
      bits are then what the slice adds to a stream of the others, or to their last `most` bytes.
    most: See `among`.
  """
  streams = {
    name: (_others(of, among[name], most) if among else b"", b"".join(each.raw for each in of))
    for name, of in domains.items()
    if all(document.scored is None for document in of)
  }
  squeeze: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9),
    "xz -9": lambda data: lzma.compress(data, preset=9),
  }

  def added(function: Callable[[bytes], bytes], before: bytes, data: bytes) -> float:
    own = len(function(before)) if before else 0
    return 8 * (len(function(before + data)) - own) / len(data)

  return {
    name: {domain: added(function, *both) for domain, both in streams.items() if both[1]}
    for name, function in squeeze.items()
  }


def _others(chosen: Sequence[Any], documents: Sequence[Any], most: int) -> bytes:
  """Returns the last bytes, `most` or fewer, of the documents that are not chosen."""
  known, parts, size = set(map(id, chosen)), [], 0
  for document in reversed(documents):
    if size >= most:
      break
    if id(document) not in known:
      parts.append(document.raw)
      size += len(parts[-1])
  return b"".join(reversed(parts))[-most:]


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
  tokens = dataclasses.replace(Tokens.of_batch(batch), per_sequence=True)
  hidden_BLD, _, sums = decoder.hidden(params, tokens)
  nats_B = jnp.sum(decoder.nll(params, hidden_BLD, batch["labels"]), axis=1)
  layers = by_layer(sums, decoder.layer_groups)
  return nats_B, {depth: of_layer.per_sequence.counts_E for depth, of_layer in layers.items()}


@functools.partial(jax.jit, static_argnums=0)
def score_tokens(decoder: Decoder, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
  """Returns (B, L) float32, the nats of each scored label."""
  hidden_BLD, _, _ = decoder.hidden(params, Tokens.of_batch(batch))
  return decoder.nll(params, hidden_BLD, batch["labels"])
