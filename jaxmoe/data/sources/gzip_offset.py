"""The offset in a gzip file at which it has given so many bytes of its content."""

from __future__ import annotations

import zlib

_GZIP = 31  # zlib's window bits for a gzip header and trailer
_CHUNK = 2**16


def compressed_bytes_for(path: str, num_bytes: int) -> int:
  """Returns how many bytes of a gzip file give the first `num_bytes` of its content.

  They were read before, so what is damaged lies behind them, or is known by the checksum alone.
  O(num_bytes) of time, none of memory.
  """
  with open(path, "rb") as file:
    member, data = zlib.decompressobj(_GZIP), b""
    while num_bytes > 0:
      data = data or file.read(_CHUNK)
      if member.eof:
        member, data = zlib.decompressobj(_GZIP), data.lstrip(b"\0")
      if not data:
        break
      try:
        num_bytes -= len(member.decompress(data, min(num_bytes, _CHUNK)))
      except zlib.error:  # all was read, and its checksum tells that it is not what was written
        break
      data = member.unused_data or member.unconsumed_tail
    return file.tell() - len(data)
