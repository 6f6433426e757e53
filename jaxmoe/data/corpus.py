"""The corpus: every source read once, checked, split and digested; its tokenizer made.

The digest covers the name, content and side of every document, so two machines with the same digest
and recipe see the same batches.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.core.config_io import to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.data.batches import BatchSpec, DomainStream, endless_batches
from jaxmoe.data.chat_format import ChatFormat, writer_for
from jaxmoe.data.document import Document, DocumentReader
from jaxmoe.data.format_selection import describe_format, select_format
from jaxmoe.data.held_out_split import held_out_units
from jaxmoe.data.loader_callbacks import CurrentDocument, LoaderCallbacks
from jaxmoe.data.mixture import Data
from jaxmoe.data.prefetch import BatchProducer, PrefetchThread
from jaxmoe.data.raw_example import Source
from jaxmoe.data.skip_report import SkipReport
from jaxmoe.data.stream import BatchStream
from jaxmoe.data.tail_split import split_tail
from jaxmoe.data.tokenizers.tokenizer import Tokenizer
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.data.validation import ValidExample, validate_source
from jaxmoe.data.worker_client import WorkerClient

Documents = Mapping[str, Sequence[Document]]
"""{domain: documents in name order}."""

CHANGES_NO_BATCH = ("cache_bytes", "worker", "allow_broken_files")
"""Fields of Data that the fingerprint leaves out: the digest of the documents tells of the last."""


def open_corpus(
  data: Data,
  cache_dir: str | os.PathLike[str] | None = None,
  progress: Callable[[str], None] | None = None,
) -> Corpus:
  """Returns the corpus of `data`; reads every source once.

  Args:
    data: The recipe.
    cache_dir: Where trained tokenizers are kept; None keeps none.
    progress: Called with a line of text before anything that takes long.

  Raises:
    InputError: no such path, no good document, too many bad ones, a domain that cannot be split,
      or a tokenizer that does not fit.
  """
  say = progress or (lambda line: None)
  ready = None if data.tokenizer.trains else data.tokenizer.build((), "", cache_dir, say)
  skipped, examples = SkipReport(), {}
  for part in data.parts:
    say(f"reading {part.source.domain}")
    examples[part.source.domain] = validate_source(part.source, data, ready, skipped, say)
  held = _held_out(examples, data.held_out, say)
  train = [example for of in examples.values() for example in of if example.raw.unit not in held]
  chat = select_format(data)
  if any(example.is_chat for of in examples.values() for example in of):
    say(describe_format(data))
  tokenizer = ready or data.tokenizer.build(
    _texts(train, chat), _train_digest(train, chat), cache_dir, say
  )
  reader = DocumentReader(tokenizer, data.cache_bytes, chat)
  sides: dict[bool, dict[str, list[Document]]] = {
    side: {
      domain: [_document(example, reader) for example in of if (example.raw.unit in held) == side]
      for domain, of in examples.items()
    }
    for side in (False, True)
  }
  kept_in = None if cache_dir is None else os.fspath(cache_dir)
  return Corpus(data, kept_in, reader, tokenizer, (sides[False], sides[True]), skipped.plain())


def read_documents(
  sources: Iterable[Source], data: Data, tokenizer: Tokenizer, say: Callable[[str], None]
) -> tuple[Documents, dict[str, Any]]:
  """Returns all documents of sources by domain, in name order, split nowhere, and what was skipped.

  Args:
    sources: Where they are; each a domain of its own.
    data: The limits, and how messages become text.
    tokenizer: What they are encoded with.
    say: Takes lines of text: what is skipped.

  Raises:
    InputError: nothing is there, too much of it is bad, or a file of records is broken.
  """
  reader, skipped = DocumentReader(tokenizer, data.cache_bytes, select_format(data)), SkipReport()
  examples = {
    source.domain: validate_source(source, data, tokenizer, skipped, say) for source in sources
  }
  if any(example.is_chat for of in examples.values() for example in of):
    say(describe_format(data))
  documents = {domain: [_document(one, reader) for one in of] for domain, of in examples.items()}
  return documents, skipped.plain()


class Corpus:
  """Documents by domain and side of the split; made by `open_corpus`.

  Attributes:
    data: The recipe.
    tokenizer: Made from the training side only, or not trained at all.
    domains: Names, in the order of the parts.
    digest: Hexadecimal digest of the names, contents and sides of all documents.
    skipped: What was not read: of bad records `counts` {domain: {reason: number}}, of broken files
      `broken` {domain: {files, bytes}}, and of both `places`, a list of `place: reason` lines that
      ends after 1000.
    statistics: {domain: {train, held_out: {documents, bytes}}}.
  """

  def __init__(
    self,
    data: Data,
    cache_dir: str | None,
    reader: DocumentReader,
    tokenizer: Tokenizer,
    sides: tuple[Documents, Documents],
    skipped: dict[str, Any],
  ):
    self.data, self.tokenizer, self.skipped = data, tokenizer, skipped
    self._cache_dir, self._reader = cache_dir, reader
    self._train, self._held_out = sides
    self._format = select_format(data)
    self.domains = tuple(self._train)
    named = {"train": self._train, "held_out": self._held_out}
    self.digest = _digest(
      f"{side}/{domain}/{document.name}:{document.digest.hex()}"
      for side, documents in named.items()
      for domain in sorted(documents)
      for document in documents[domain]
    )
    self.statistics = {
      domain: {side: _count(documents[domain]) for side, documents in named.items()}
      for domain in self.domains
    }

  def train(self, domain: str) -> Sequence[Document]:
    """Returns the documents of `domain` that are trained on, in name order."""
    return self._of(self._train, domain)

  def held_out(self, domain: str) -> Sequence[Document]:
    """Returns the documents of `domain` that are never trained on, in name order."""
    return self._of(self._held_out, domain)

  @property
  def identity(self) -> dict[str, Any]:
    """What tells this corpus from another: digests of text and tokenizer, and what there is."""
    return {
      "digest": self.digest, "tokenizer": self.tokenizer.digest, "domains": self.statistics
    }  # fmt: skip

  def with_tokenizer_at(self, path: str) -> Corpus:
    """Returns the corpus of the recipe whose tokenizer is a copy at `path` of this one's file."""
    assert isinstance(self.data.tokenizer, TokenizerFile)
    found = copy.copy(self)
    tokenizer = dataclasses.replace(self.data.tokenizer, path=path)
    found.data = dataclasses.replace(self.data, tokenizer=tokenizer)
    return found

  def fingerprint(self, batch_size: int, seed: int) -> str:
    """Returns a digest of all that batches depend on; the number of processes is not among it.

    Fields added later count where they have another value than before.
    """
    fields = to_plain(self.data, as_before=True)
    fields["chat"] = self._format.plain
    plain = {name: value for name, value in fields.items() if name not in CHANGES_NO_BATCH}
    parts = [plain, self.digest, self.tokenizer.digest, batch_size, seed]
    return _digest([json.dumps(parts, sort_keys=True)])

  def stream(
    self,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    callbacks: LoaderCallbacks = LoaderCallbacks(),  # noqa: B008
  ) -> BatchStream:
    """Returns the endless training batches of one process.

    Args:
      batch_size: Rows of the global batch.
      seed: Another seed, another order of documents and rows.
      process_index: Which slice of the rows this process keeps.
      process_count: How many slices there are; must divide `batch_size`.
      callbacks: Who is told when a batch is late or a document cannot be read.
    """
    arguments = batch_size, seed, process_index, process_count
    fingerprint = self.fingerprint(batch_size, seed)
    producer: BatchProducer = self.prefetch(*arguments)
    if self.data.worker == "process":
      job = {
        "data": to_plain(self.data),
        "cache_dir": self._cache_dir,
        "stream": arguments,
        "fingerprint": fingerprint,
      }
      producer = WorkerClient(job, producer.state(), callbacks)
    sizes = {domain: len(documents) for domain, documents in self._train.items()}
    return BatchStream(producer, sizes, fingerprint, callbacks)

  def prefetch(
    self, batch_size: int, seed: int, process_index: int, process_count: int
  ) -> PrefetchThread:
    """Returns the thread that makes the batches of `stream`; it starts when one is taken."""
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
      raise InputError(
        f"the batch must divide evenly over the processes, got {batch_size=} {process_count=}"
      )
    if not 0 <= process_index < process_count:
      raise InputError(f"process_index must be below process_count, got {process_index=}")
    rows = batch_size // process_count
    spec = BatchSpec(
      shape=(batch_size, self.data.seq_len),
      keep=slice(process_index * rows, (process_index + 1) * rows),
      shuffle_tokens=self.data.shuffle_tokens,
      ends=(self.tokenizer.start_id, self.tokenizer.eod_id),
      seed=seed,
    )
    total, reading = sum(part.weight for part in self.data.parts), CurrentDocument()
    shares = {part.source.domain: part.weight / total for part in self.data.parts}
    streams = [DomainStream(domain, self._train[domain], share) for domain, share in shares.items()]
    batches = endless_batches(streams, spec, reading)
    return PrefetchThread(batches, spec.num_prefetched, reading, self._reader.failures)

  def _of(self, documents: Documents, domain: str) -> Sequence[Document]:
    if domain not in documents:
      raise InputError(f"no domain {domain!r}; there are {', '.join(self.domains)}")
    return documents[domain]


def _held_out(
  examples: dict[str, list[ValidExample]], share: float, say: Callable[[str], None]
) -> set[str]:
  """Returns the units that are held out; a domain of one document becomes two of its parts."""
  ends = set()
  counts = collections.Counter(example.raw.unit for of in examples.values() for example in of)
  for domain, of in examples.items():
    alone = len(of) == 1 and counts[of[0].raw.unit] == 1
    parts = split_tail(of[0], share) if alone else None
    if parts is not None:
      examples[domain] = list(parts)
      ends.add(parts[1].raw.unit)
      say(f"{domain} is one document: its last {parts[1].num_bytes:,} bytes are held out")
  keys = {
    domain: [(example.raw.split_key, example.raw.unit) for example in of]
    for domain, of in examples.items()
    if not ends.intersection(example.raw.unit for example in of)
  }
  return held_out_units(keys, share) | ends


def _document(example: ValidExample, reader: DocumentReader) -> Document:
  raw = example.raw
  return Document(
    name=raw.name,
    num_bytes=example.num_bytes,
    digest=example.digest,
    answer=raw.answer,
    source=example.source,
    locator=raw.locator,
    reader=reader,
    unscored_bytes=example.unscored_bytes,
    in_part=example.in_part,
  )


def _texts(examples: Iterable[ValidExample], chat: ChatFormat) -> Iterator[str]:
  for example in examples:
    content = example.source.read(example.raw.locator)
    if isinstance(content, str):
      yield content
    else:
      assert not isinstance(content, np.ndarray), "ids are refused while no tokenizer is known"
      yield from (text for text, _ in writer_for(content, chat).text(content, None))


def _train_digest(examples: Iterable[ValidExample], chat: ChatFormat) -> str:
  names = (f"{one.source.domain}/{one.raw.name}:{one.digest.hex()}" for one in examples)
  return _digest([json.dumps(chat.plain), *names])


def _digest(lines: Iterable[str]) -> str:
  digest = hashlib.sha256()
  for line in lines:
    # A file name need not be UTF-8.
    digest.update(line.encode("utf-8", errors="surrogateescape") + b"\n")
  return digest.hexdigest()


def _count(documents: Sequence[Document]) -> dict[str, int]:
  return {"documents": len(documents), "bytes": sum(item.num_bytes for item in documents)}
