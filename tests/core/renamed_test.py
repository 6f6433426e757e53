import dataclasses

import pytest

from jaxmoe.core import config_io
from jaxmoe.core.errors import InputError
from jaxmoe.core.renamed import advice, renamed


@dataclasses.dataclass(frozen=True)
class Net:
  mlp_dim: int = renamed("hidden")
  bias: bool = False


@dataclasses.dataclass(frozen=True)
class Wide(Net):
  factor: int = renamed("times", config_io.added(2, before=1))


NETS = {"net": (Net, Net(4)), "wide": (Wide, Wide(4))}


@dataclasses.dataclass(frozen=True)
class Model:
  dim: int = 8
  nets: tuple[Net, ...] = renamed("networks", config_io.choice(NETS, (Net(4),)))
  optional: Net | None = None


OLD = {
  "dim": 8,
  "networks": [{"kind": "net", "hidden": 4, "bias": False}, {"kind": "wide", "hidden": 5}],
  "optional": {"hidden": 6},
}
MEANT = Model(8, (Net(4), Wide(5, factor=1)), Net(6))


def test_a_file_with_old_names_opens_and_is_written_with_the_new_ones():
  record = config_io.from_plain(Model, OLD)
  assert record == MEANT
  assert config_io.diff(record, MEANT) == {}
  assert config_io.to_plain(record)["nets"][0] == {"kind": "net", "mlp_dim": 4, "bias": False}
  assert config_io.from_json(Model, config_io.to_json(record)) == record


def test_what_digests_hash_has_the_old_names_in_the_old_order():
  plain = config_io.to_plain(MEANT, as_before=True)
  assert list(plain) == ["dim", "networks", "optional"]
  assert plain["networks"] == [
    {"kind": "net", "hidden": 4, "bias": False}, {"kind": "wide", "hidden": 5, "bias": False},
  ]  # fmt: skip
  assert list(plain["networks"][0]) == ["kind", "hidden", "bias"]


def test_a_recipe_of_today_becomes_that_of_a_run_with_old_names():
  today = Model(8, (Net(4), Wide(5)), Net(6))
  assert config_io.as_begun(today, OLD) == MEANT
  explicit = {**OLD, "networks": [OLD["networks"][0], {"kind": "wide", "hidden": 5, "times": 2}]}
  assert config_io.as_begun(today, explicit) == today


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("nets.0.hidden", "config.nets.0.hidden: is called mlp_dim now; set config.nets.0.mlp_dim"),
    ("optional.hidden", "set config.optional.mlp_dim"),
    ("networks.0.mlp_dim", "config.networks: is called nets now; set config.nets"),
    ("nets.1.times", "set config.nets.1.factor"),
  ],
)
def test_an_old_path_on_the_command_line_is_refused_with_the_new_one(path, words):
  with pytest.raises(InputError) as caught:
    config_io.override(MEANT, [(path, "3")])
  assert words in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_field_under_both_names_is_refused():
  with pytest.raises(InputError, match=r"config: mlp_dim is given twice, as hidden too"):
    config_io.from_plain(Net, {"mlp_dim": 1, "hidden": 1})


@pytest.mark.parametrize("make", [Net, Wide, lambda **old: dataclasses.replace(Net(1), **old)])
def test_an_old_name_as_a_keyword_is_answered_with_the_new_one(make):
  with pytest.raises(TypeError) as caught:
    make(hidden=3)
  assert advice(Model, str(caught.value)) == "hidden is called mlp_dim now; "


def test_other_type_errors_get_no_advice():
  with pytest.raises(TypeError) as caught:
    Net(3, nothing=3)
  assert advice(Model, str(caught.value)) == ""
  assert advice(Model, "Other.__init__() got an unexpected keyword argument 'hidden'") == ""
  assert advice(Model, "unsupported operand") == ""
