"""What is kept in memory of documents, and what is read again."""

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.document import Document, DocumentReader, content_digest
from jaxmoe.data.tokenizers.byte import ByteTokenizer


class _Counting:
  """A source that counts its reads."""

  domain = "counting"

  def __init__(self, texts):
    self.texts, self.reads = texts, []

  def scan(self, max_bytes):
    return iter(())

  def read(self, locator):
    self.reads.append(locator)
    return self.texts[locator]


def _documents(source, cache_bytes):
  reader = DocumentReader(ByteTokenizer(), cache_bytes)
  return [
    Document(str(i), len(text), content_digest(text), None, source, i, reader)
    for i, text in enumerate(source.texts)
  ]


# Four ids take 8 bytes, as 257 fits in two bytes; what no longer fits is read every time.
@pytest.mark.parametrize(("cache_bytes", "kept"), [(0, 0), (7, 0), (8, 1), (17, 2), (99, 3)])
def test_ids_are_kept_up_to_the_stated_bytes(cache_bytes, kept):
  source = _Counting(["aaaa", "bbbb", "cccc"])
  documents = _documents(source, cache_bytes)
  for _ in range(3):
    for document, text in zip(documents, source.texts):
      assert document.ids.dtype == np.int32
      assert bytes(document.ids.tolist()) == text.encode()
  first, again = source.reads[:kept], source.reads[kept:]
  assert first == list(range(kept)) and not set(again) & set(first)
  assert len(again) == 6 * 3 - 6 * kept


def test_changing_returned_ids_does_not_change_what_is_kept():
  (document,) = _documents(_Counting(["abcd"]), 99)
  for _ in range(2):
    ids = document.ids
    ids[:] = 0
  assert document.ids.tolist() == list(b"abcd")


def test_text_and_ids_with_the_same_bytes_have_other_digests():
  ids = np.frombuffer(b"abcd", np.int32)
  assert content_digest("abcd") != content_digest(ids)


def test_content_that_changed_is_named():
  source = _Counting(["abcd"])
  (document,) = _documents(source, 0)
  source.texts[0] = "abce"
  with pytest.raises(InputError, match="'0' of 'counting' changed"):
    _ = document.ids


class _Failing(_Counting):
  """A source whose first reads fail."""

  def __init__(self, texts, failures):
    super().__init__(texts)
    self.left = failures

  def read(self, locator):
    self.left -= 1
    if self.left >= 0:
      raise OSError(5, "Input/output\nerror")
    return super().read(locator)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_read_that_fails_is_tried_again_and_noted(failures):
  source = _Failing(["abcd"], failures)
  reader = DocumentReader(ByteTokenizer(), 0, waits_s=(0, 0))
  document = Document("d", 4, content_digest("abcd"), None, source, 0, reader)
  assert document.text == "abcd"
  assert list(reader.failures) == [("counting", "d", "Input/output error")] * failures


def test_a_read_that_keeps_failing_names_the_document():
  source = _Failing(["abcd"], 99)
  reader = DocumentReader(ByteTokenizer(), 0, waits_s=(0, 0))
  document = Document("d", 4, content_digest("abcd"), None, source, 0, reader)
  with pytest.raises(InputError, match=r"^document 'd' of 'counting' could not be read in 3 tries"):
    document.content  # noqa: B018
  assert len(reader.failures) == 2 and source.left == 96
