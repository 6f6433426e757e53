"""Bytes to text: UTF-8, or what a byte order mark says; and names for what is neither.

A mark tells how the text is written and is no part of it.
"""

from __future__ import annotations

import codecs

from jaxmoe.data.raw_example import INVALID_UTF8

_MARKS = (
  (codecs.BOM_UTF8, "utf-8"),
  (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like the next
  (codecs.BOM_UTF16_LE, "utf-16-le"),
  (codecs.BOM_UTF32_BE, "utf-32-be"),
  (codecs.BOM_UTF16_BE, "utf-16-be"),
)
HEAD = 16  # bytes that tell
_FORMATS = (
  (b"\x1f\x8b", "gzip data"),
  (b"PK\x03\x04", "a zip archive"),
  (b"PAR1", "a parquet file"),
  (b"ARROW1", "an arrow file"),
  (b"%PDF-", "a PDF file"),
  (b"BZh", "bzip2 data"),
  (b"\xfd7zXZ\0", "xz data"),
  (b"\x28\xb5\x2f\xfd", "zstandard data"),
)


def byte_order_mark(raw: bytes) -> tuple[str, int]:
  """Returns the encoding that the first bytes of a text tell, and how many bytes tell it."""
  return next(((name, len(sign)) for sign, name in _MARKS if raw.startswith(sign)), ("utf-8", 0))


def decode(raw: bytes) -> str:
  """Returns the text of a whole file, without its mark and with its newlines as they are.

  Raises:
    UnicodeDecodeError: its reason is what the bytes are instead.
  """
  encoding, size = byte_order_mark(raw)
  try:
    text = raw[size:].decode(encoding)
  except UnicodeDecodeError as error:
    invalid = INVALID_UTF8 if encoding == "utf-8" else f"invalid {encoding[:6].upper()}"
    raise UnicodeDecodeError(encoding, b"", 0, 0, binary_format(raw) or invalid) from error
  if _is_unmarked(raw):
    raise UnicodeDecodeError(encoding, b"", 0, 0, binary_format(raw))
  return text


def binary_format(raw: bytes) -> str:
  """Returns what a file is that begins with these bytes and is no text, or ''."""
  form = next((name for sign, name in _FORMATS if raw.startswith(sign)), "")
  return form or ("UTF-16 without a byte order mark" if _is_unmarked(raw) else "")


def _is_unmarked(raw: bytes) -> bool:
  """Whether most bytes in even or in odd places are 0 and hardly any other: ASCII as UTF-16."""
  if byte_order_mark(raw)[1]:
    return False
  first, second = raw[: 2**16 : 2], raw[1 : 2**16 : 2]
  some, other = sorted((first.count(0), second.count(0)))
  return len(raw) > 1 and 2 * other > len(first) and 8 * some < len(first)
