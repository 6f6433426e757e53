"""Every family against what transformers made of a tiny model; `golden.py` writes the files."""

import pytest
import safetensors.numpy

from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.model_family import differences
from tests.models.pretrained.golden import FOLDER, PROMPT
from tests.models.pretrained.ours import Ours, check_forward, check_gradients, check_greedy

# Their caches hold all that any family's does; the others' are compared, too, but slow.
CACHES = {"deepseek_v3", "gpt_oss", "mixtral", "phimoe"}
WRITERS = [
  name if name in CACHES else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]


def read(model_type):
  expected = safetensors.numpy.load_file(FOLDER / model_type / "expected.safetensors")
  return Ours(FOLDER / model_type), expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_computes_what_transformers_does(model_type):
  ours, expected = read(model_type)

  def under(prefix):
    return {name.removeprefix(prefix): x for name, x in expected.items() if name.startswith(prefix)}

  choices = {int(depth): x for depth, x in under("choices.").items()}
  grads = check_forward(ours.with_dispatch("dense"), expected["ids"], expected["logits"], choices)
  check_gradients(ours, grads, under("grad."))
  assert not ours.checkpoint.unread
  assert differences(FAMILIES[model_type], ours.checkpoint.model) == []


@pytest.mark.parametrize("model_type", WRITERS)
def test_a_family_writes_what_transformers_does(model_type):
  ours, expected = read(model_type)
  prompt = expected["ids"][:, :PROMPT]
  check_greedy(ours, prompt, expected["written"], expected["margin"])


def test_golden_files_are_small():
  for folder in FOLDER.iterdir():
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
