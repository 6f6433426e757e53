"""Writes the golden files: tiny models of every family and what transformers makes of them.

pip install '.[hf]' && python -m tests.models.pretrained.golden [FAMILY ...]
"""

import pathlib
import sys

import numpy as np
import safetensors.numpy

from tests.models.pretrained import reference
from tests.models.pretrained.cases import GOLDEN

FOLDER = pathlib.Path(__file__).parent / "golden"
PROMPT, NEW = 8, 12


def write(model_type):
  folder = FOLDER / model_type
  ids = reference.ids_of((2, 24))
  model, written, margin = reference.sure(model_type, GOLDEN[model_type], ids[:, :PROMPT], NEW)
  reference.save(model, folder)
  (folder / "generation_config.json").unlink(missing_ok=True)
  logits, choices = reference.forward(model, ids)
  expected = {
    "ids": ids, "logits": logits, "written": written, "margin": margin,
    **{f"choices.{depth}": x.astype(np.int32) for depth, x in choices.items()},
    **{f"grad.{name}": x for name, x in reference.gradients(model, ids).items()},
  }  # fmt: skip
  safetensors.numpy.save_file(expected, folder / "expected.safetensors")
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(f"{model_type}: {size / 1e3:.0f} kB, {len(np.unique(written))} different ids written")


if __name__ == "__main__":
  for name in sys.argv[1:] or GOLDEN:
    write(name)
