"""A recipe that its degrees cannot spread is refused in one line that says what would work."""

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.runs.recipe_loading import load_recipe


@pytest.mark.parametrize(
  "recipe, changes, words",
  [
    ("tiny.py", ("data=3",), "batch_size must be a multiple of 3.*set it to 3 or 6"),
    ("tiny.py", ("tensor=3",), "num_heads must be a multiple of 3"),
    ("tiny.py", ("expert=3", "train.batch_size=6"), "num_experts must be a multiple of 3"),
    ("tiny.py:attention=experts", ("tensor=2",), "attention experts.*set tensor=1"),
    ("tiny.py:dispatch=capacity", ("tensor=2", "expert=2", "fold=tensor"), "leave tensor out"),
    ("tiny.py", ("tensor=2", "sequence=true", "data.seq_len=63"), "seq_len must be a multiple"),
    ("tiny.py", ("sequence=true",), "sequence=false"),
    ("tiny.py", ("partition_activations=true",), "set tensor above 1"),
    ("tiny.py", ("tensor=2", "sequence=true", "partition_activations=true"), "spreads it already"),
    ("tiny.py", ("tensor=2", "partition_activations=true"), "set model.remat=full"),
    ("tiny.py", ("tensor=2", "partition_activations=true", "model.remat=full", "data.seq_len=63"),
     "seq_len must be a multiple"),
    ("tiny.py", ("pipe=2",), "as many microbatches or more.*set train.num_micro=2 or more"),
    ("tiny.py", ("pipe=4", "train.num_micro=4"), "4 stages.*the model has 2; set parallel.pipe"),
    ("tiny.py", ("pipe=2", "pipeline=interleaved", "train.num_micro=2"), "has 4 stages"),
    ("tiny.py", ("pipe=2", "pipeline=later", "train.num_micro=2"), "must be one of gpipe, 1f1b"),
    ("tiny.py", ("pipe=2", "stages=(2,1)", "train.num_micro=2"), "give 2 numbers that sum to 2"),
    ("tiny.py", ("stages=(2,1)",), "set pipe above 1, or stages"),
    ("tiny.py", ("context=3",), "seq_len must be a multiple of 6, 2 \\* context.*60 or 66"),
    ("tiny.py", ("context=4", "attend=ulysses"), "ulysses shares out 2 query heads"),
    ("tiny.py:attention=latent", ("context=2", "attend=ulysses"), "latents.*attend=ring"),
    ("tiny.py:attention=binary_linear", ("context=2", "order=zigzag"), "set order=plain"),
    ("tiny.py:attention=stick_breaking", ("context=2", "attend=ring", "order=balanced"),
     "nearer keys first.*attend=gather or ulysses"),
    ("tiny.py:dispatch=capacity", ("context=2",), "capacity.*set dispatch=dropless"),
    ("tiny.py:router=expert_choice", ("context=2",), "looks at a whole batch.*context=1"),
    ("tiny.py:exchange=all_to_all_bounded", ("context=2", "expert=2"), "bound=none"),
    ("tiny.py", ("context=2", "tensor=2", "sequence=true", "data.seq_len=62"), "multiple of 4"),
    ("tiny.py", ("train.batch_size=99999999999",), "counts are of 32 bits.*lower the batch"),
    ("tiny.py", ("data.seq_len=99999999999",), "399,999,999,996 tokens of a microbatch"),
  ],
)
def test_it_is_refused(recipe, changes, words):
  fields = [change if "." in change.split("=")[0] else f"parallel.{change}" for change in changes]
  with pytest.raises(InputError, match=words) as caught:
    load_recipe(f"configs/{recipe}", [f"--config.{field}" for field in fields])
  assert "\n" not in str(caught.value)


def test_one_device_takes_any_batch():
  assert load_recipe("configs/tiny.py", ["--config.train.batch_size=3"]).train.batch_size == 3
