"""What the bytes of a .txt file mean, and what a file is called that is none."""

import codecs
import gzip

import pytest

from jaxmoe.data.sources.text_files import TextFiles

TEXT = "a \N{SNOWMAN}\r\n\ufeffb\n"
WRITTEN = {
  "plain": TEXT.encode("utf-8"),
  "utf-8": codecs.BOM_UTF8 + TEXT.encode("utf-8"),
  "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
  "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
  "utf-32-le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
  "utf-32-be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
}
STRANGE = {
  "latin-1": ("Grüße".encode("latin-1"), "invalid UTF-8"),
  "unmarked": ("plain words".encode("utf-16-le"), "UTF-16 without a byte order mark"),
  "unmarked, big-endian": ("Grüße".encode("utf-16-be"), "UTF-16 without a byte order mark"),
  "cut": (codecs.BOM_UTF16_LE + b"a\0b", "invalid UTF-16"),
  "gzip": (gzip.compress(b"text"), "gzip data"),
  "PDF": (b"%PDF-1.7\n\xe2\xe3", "a PDF file"),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(write_texts, form):
  source = TextFiles(write_texts({"a.txt": WRITTEN[form]}))
  (entry,) = source.scan(99)
  assert (entry.content, entry.error) == (TEXT, "")
  assert source.read(entry.locator) == TEXT


@pytest.mark.parametrize("form", STRANGE)
def test_what_is_no_text_is_named_for_what_it_is(write_texts, form):
  raw, named = STRANGE[form]
  (entry,) = TextFiles(write_texts({"a.txt": raw})).scan(99)
  assert (entry.content, entry.error) == (None, named)


def test_as_found_a_mark_is_text_and_other_encodings_are_not(write_texts):
  folder = write_texts({"a.txt": WRITTEN["utf-8"], "b.txt": WRITTEN["utf-16-le"]})
  source = TextFiles(folder, as_found=True)
  marked, wide = source.scan(99)
  assert marked.content == source.read(marked.locator) == f"\ufeff{TEXT}"
  assert wide.error == "invalid UTF-8"
