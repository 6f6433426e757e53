"""Terminal output: text of models, data and file names must not control it."""

from __future__ import annotations

import unicodedata


def escaped(text: str) -> str:
  r"""Returns text with `\x1b` and the like in the place of control characters.

  Lines and tabs stay. What is written to files is not for this: they keep the text as it is.
  """
  return "".join(
    f"\\x{ord(letter):02x}"
    if unicodedata.category(letter) == "Cc" and letter not in "\n\t"
    else letter
    for letter in text
  )
