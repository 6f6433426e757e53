"""Token ids in a file: an .npy of int32 (B, L), never a pickle."""

from __future__ import annotations

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.runs.scoring import check_ids


def read_ids(path: str, vocab_size: int, context: int, where: str) -> np.ndarray:
  """Returns the checked ids of an .npy file; `where` is what a mistake is said to be about.

  Raises:
    InputError: not an .npy, one that needs pickle, another dtype or rank, no or too many ids in a
      row, or an id outside the vocabulary.
  """
  try:
    with open(path, "rb") as file:
      ids = np.load(file, allow_pickle=False)
  except OSError as error:
    raise InputError(f"{where}: cannot be read ({error.strerror}); give an .npy") from None
  except Exception as error:  # NumPy raises whatever its parsers raise
    raise InputError(
      f"{where}: not a plain .npy file ({error}); write it with np.save, without pickle"
    ) from None
  if not isinstance(ids, np.ndarray):
    raise InputError(f"{where}: needs an int32 array (B, L), got an archive")
  check_ids(ids, vocab_size, context, where)
  return ids
