"""A layout whose devices would hold the same large activation is refused, and told what works."""

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.models.block import ATTENTION
from jaxmoe.moe.dispatch import DISPATCHERS, EXCHANGES
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import GIB, make_layout
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.replication_check import check_replication, replicated_activations

FAMILIES = {
  "router": ROUTERS, "dispatch": DISPATCHERS, "exchange": EXCHANGES, "experts": EXPERTS,
  "attention": ATTENTION,
}  # fmt: skip
LAYOUTS = (
  ("tensor=2", "expert=2"), ("tensor=2", "sequence=true", "fold=tensor", "fsdp=2"),
  ("data=2", "expert=2", "fold=data"), ("fsdp=2", "tensor=2", "expert=2"),
)  # fmt: skip
ROWS, LENGTH, DIM, FLOAT = 8, 64, 32, 4


def recipe(*changes, names=""):
  sizes = (f"train.batch_size={ROWS}", f"data.seq_len={LENGTH}", f"model.dim={DIM}")
  return load_recipe(f"configs/tiny.py{names}", [f"--config.{one}" for one in (*sizes, *changes)])


def check(experiment):
  return check_replication(experiment, experiment.decoder(), make_layout(experiment.parallel))


def found(*changes, names=""):
  experiment = recipe(*(f"parallel.{change}" for change in changes), names=names)
  return replicated_activations(experiment, experiment.decoder(), make_layout(experiment.parallel))


@pytest.mark.parametrize("layout", ["data=4", "expert=4", "fsdp=4"])
def test_devices_with_tokens_of_their_own_hold_nothing_alike(layout):
  assert found(layout) == ()


def test_the_stream_is_alike_over_tensor_devices():
  made = found("tensor=2", "data=2")
  assert {one.axes for one in made} == {("tensor",)}
  stream = [one for one in made if one.scope == "embed" and one.dtype == "float32"]
  assert [one.bytes for one in stream] == [ROWS // 2 * LENGTH * DIM * FLOAT]


def test_sequence_sharding_leaves_what_a_pair_of_products_takes():
  made = found("tensor=2", "sequence=true")
  assert not [one for one in made if one.scope in ("embed", "final_norm")]
  # The products' inputs, gathered.
  assert max(one.bytes for one in made if one.scope.startswith("attention")) == (
    ROWS * LENGTH * DIM * FLOAT
  )


def test_experts_folded_over_tensor_devices_get_rows_of_their_own():
  whole = max(one.bytes for one in found("tensor=2") if one.scope.startswith("experts"))
  rest = [one for one in found("tensor=2", "fold=tensor") if one.scope.startswith("experts")]
  assert whole > ROWS * LENGTH * DIM * FLOAT
  assert rest == []


def test_an_exchange_by_gathering_has_the_rows_of_all_everywhere():
  made = found("expert=4", names=":exchange=all_gather")
  assert made[0].axes == ("expert",)
  assert made[0].bytes == ROWS * LENGTH * DIM * FLOAT


@pytest.mark.parametrize(
  "names, changes, limit, works",
  [
    (":exchange=all_gather", ("parallel.expert=4",), 40_000, "exchange=all_to_all"),
    ("", ("parallel.tensor=2",), 70_000, "parallel.fold=tensor"),
    ("", ("parallel.tensor=2", "parallel.fold=tensor"), 65_000, "train.num_micro=2"),
    (":dispatch=capacity", ("parallel.tensor=2",), 100_000, "train.num_micro=2"),
    ("", ("parallel.tensor=2", "train.num_micro=8"), 2_000, None),
  ],
)
def test_it_is_refused_in_a_line_that_says_what_works(names, changes, limit, works):
  gib = f"parallel.max_replicated_gib={limit / GIB!r}"
  with pytest.raises(InputError, match="would hold the same activation") as caught:
    check(recipe(*changes, gib, names=names))
  said = str(caught.value)
  assert "\n" not in said
  if works is None:
    assert "make batches or sequences shorter" in said
    return
  assert f"; set {works}, or set parallel.max_replicated_gib higher" in said
  if works.startswith("exchange"):
    check(recipe(*changes, gib, names=f":{works}"))
  else:
    check(recipe(*changes, gib, works, names=names))


def test_a_layout_of_what_a_run_takes_by_default_is_not_refused():
  assert check(recipe("parallel.tensor=2", "parallel.expert=2"))


def test_a_limit_of_nothing_is_refused():
  with pytest.raises(InputError, match="max_replicated_gib must be above 0"):
    recipe("parallel.max_replicated_gib=0")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_member_can_be_looked_at(family):
  for name in FAMILIES[family]:
    tried = 0
    for layout in LAYOUTS:
      changes = [f"parallel.{change}" for change in layout]
      try:
        experiment = recipe(*changes, names=f":{family}={name}")
      except InputError:  # not offered
        continue
      made = replicated_activations(
        experiment, experiment.decoder(), make_layout(experiment.parallel)
      )
      assert bool(made) == (experiment.parallel.tensor > 1 or name == "all_gather"), (name, layout)
      tried += 1
    assert tried, name
