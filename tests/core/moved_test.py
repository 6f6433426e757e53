import copy
import dataclasses
from typing import Any, ClassVar

import pytest

from jaxmoe.core import config_io
from jaxmoe.core.errors import InputError
from jaxmoe.core.moved import Moved
from jaxmoe.core.renamed import advice


@dataclasses.dataclass(frozen=True)
class Layer:
  width: int = 4


@dataclasses.dataclass(frozen=True)
class Ways:
  product: str = "auto"
  whole: str = "auto"


LAYERS = {"layer": (Layer, Layer())}


@dataclasses.dataclass(frozen=True)
class Recipe:
  layers: tuple[Any, ...] = config_io.choice(LAYERS, (Layer(),))
  ways: Ways = config_io.added(Ways(), before=Ways())

  moved: ClassVar[tuple[Moved, ...]] = (
    Moved(
      "Layer",
      "layers.*.way",
      {"slow": {"ways.product": "loop", "ways.whole": "rows"}, "fast": {"ways.whole": "fused"}},
    ),
  )


def old(*ways):
  """Returns the file of a recipe whose layers went these ways."""
  return {"layers": [{"kind": "layer", "width": 3, "way": way} for way in ways]}


def test_what_a_file_has_at_the_old_place_stands_at_the_new_one():
  plain = old("slow", "slow")
  kept = copy.deepcopy(plain)
  assert config_io.from_plain(Recipe, plain) == Recipe((Layer(3), Layer(3)), Ways("loop", "rows"))
  assert plain == kept
  assert config_io.from_plain(Recipe, old("fast")) == Recipe((Layer(3),), Ways(whole="fused"))


def test_defaults_stay_defaults_and_so_does_what_differed_from_place_to_place():
  assert config_io.from_plain(Recipe, old("auto")) == Recipe((Layer(3),))
  mixed = config_io.from_plain(Recipe, old("slow", "fast"))
  assert mixed.ways == Ways(product="loop")


def test_the_new_place_counts_where_a_file_has_both():
  both = old("slow") | {"ways": {"product": "blocks"}}
  assert config_io.from_plain(Recipe, both).ways == Ways("blocks", "rows")


def test_what_is_written_is_read_again_and_has_no_old_field():
  recipe = config_io.from_plain(Recipe, old("slow"))
  assert config_io.from_json(Recipe, config_io.to_json(recipe)) == recipe
  assert "way" not in config_io.to_plain(recipe)["layers"][0]


def test_an_old_path_on_the_command_line_is_refused_with_the_new_one():
  with pytest.raises(InputError, match=r"0\.way: is ways\.product and ways\.whole now; set"):
    config_io.override(Recipe(), [("layers.0.way", "slow")])
  with pytest.raises(InputError, match="unknown field of Layer 'ways'"):
    config_io.override(Recipe(), [("layers.0.ways", "slow")])


def test_code_that_sets_the_old_field_is_told_where_it_is():
  with pytest.raises(TypeError) as caught:
    Layer(way="slow")
  assert advice(Recipe, str(caught.value)) == (
    "way is ways.product and ways.whole of the experiment now; "
  )
