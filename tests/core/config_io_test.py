import dataclasses
import itertools
from typing import Literal

import pytest

from jaxmoe.core import config_io
from jaxmoe.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Red:
  depth: int = 1


@dataclasses.dataclass(frozen=True)
class Blue:
  shade: float = 0.5
  tags: tuple[str, ...] = ("a",)


COLOURS = {"red": (Red, Red()), "blue": (Blue, Blue(shade=0.1))}


@dataclasses.dataclass(frozen=True)
class Inner:
  total: int = 8
  active: int = 2
  mode: Literal["fast", "slow"] = "fast"
  colour: Red | Blue = config_io.choice(COLOURS, Red())

  def __post_init__(self) -> None:
    if self.active > self.total:
      raise InputError(f"active must be at most total: {self.active=} {self.total=}")


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner = Inner()
  rate: float = 1e-4
  limit: int | None = None
  flag: bool = True
  palette: tuple[Red | Blue, ...] = config_io.choice(COLOURS, (Red(2), Blue()))
  parts: tuple[tuple[Inner, ...], ...] = ((Inner(),),)
  pair: tuple[int, float] = (1, 2.0)


@pytest.mark.parametrize(
  "record",
  [
    Outer(),
    Outer(rate=0.1 + 0.2, limit=3, flag=False, palette=()),
    Outer(inner=Inner(colour=Blue(1e-300, ())), parts=((), (Inner(9), Inner(7)))),
  ],
)
def test_from_json_is_the_exact_inverse_of_to_json(record):
  again = config_io.from_json(Outer, config_io.to_json(record))
  assert again == record
  assert config_io.to_json(again) == config_io.to_json(record)
  assert type(again.rate) is float


def test_overrides_agree_in_every_order_and_checks_see_final_values():
  changes = [("inner.total", "200"), ("inner.active", "99"), ("rate", "3e-2"), ("limit", "7")]
  results = {config_io.override(Outer(), order) for order in itertools.permutations(changes)}
  (result,) = results
  assert (result.inner.total, result.inner.active, result.rate, result.limit) == (200, 99, 0.03, 7)


def test_overrides_reach_tuples_components_and_optionals():
  result = config_io.override(
    Outer(limit=4),
    [
      ("palette.1.shade", "0.25"),
      ("palette.1.tags", "x,y"),
      ("parts.0.0.mode", "slow"),
      ("limit", "none"),
      ("flag", "false"),
      ("pair", "3,4"),
    ],
  )
  assert result.palette[1] == Blue(0.25, ("x", "y"))
  assert result.parts[0][0].mode == "slow"
  assert result.limit is None
  assert result.flag is False
  assert result.pair == (3, 4.0)


@pytest.mark.parametrize(
  ("path", "text", "expected"),
  [
    ("inner.activ", "3", "did you mean 'active'"),
    ("nothing", "3", "unknown field of Outer"),
    ("inner.active", "many", "config.inner.active: expected int, got 'many'"),
    ("inner.active", "99", "active must be at most total"),
    ("inner.active", "1.5", "expected int"),
    ("inner.mode", "medium", "unknown value 'medium'"),
    ("inner.colour", "blue", "is a component"),
    ("inner", "3", "is a component"),
    ("flag", "1", "expected bool"),
    ("rate", "nan", "finite"),
    ("palette.2.depth", "1", "has 2 entries"),
    ("palette.x", "1", "has 2 entries"),
    ("palette.\u00b2.depth", "1", "has 2 entries"),
    ("palette." + "9" * 5000, "1", "has 2 entries"),
    ("rate.x", "1", "has no field"),
    ("limit", "1.5", "expected int"),
    ("pair", "1", "expected 2 values"),
  ],
)
def test_a_bad_override_is_one_line_that_names_the_field(path, text, expected):
  with pytest.raises(InputError, match="config") as caught:
    config_io.override(Outer(), [(path, text)])
  assert expected in str(caught.value)
  assert "\n" not in str(caught.value)


def test_one_field_set_twice_is_refused():
  with pytest.raises(InputError, match="set twice"):
    config_io.override(Outer(), [("rate", "1"), ("rate", "2")])
  with pytest.raises(InputError, match="set twice"):
    config_io.override(Outer(), [("pair", "1,2"), ("pair.0", "2")])


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("{", "not JSON"),
    ("[]", "expected the fields of Outer"),
    ('{"x": 1}', "unknown field of Outer 'x'"),
    ('{"flag": 1}', "expected bool, got 1"),
    ('{"limit": true}', "expected int, got True"),
    ('{"inner": {"colour": {"kind": "green"}}}', "unknown component 'green'"),
    ('{"inner": {"colour": {"depth": 3}}}', "expected an object with 'kind'"),
    ('{"palette": 3}', "expected a list"),
    ('{"inner": {"active": 9}}', "config.inner: active must be at most total"),
  ],
)
def test_bad_json_is_one_line_that_names_the_field(text, expected):
  with pytest.raises(InputError) as caught:
    config_io.from_json(Outer, text)
  assert expected in str(caught.value)


def test_diff_names_changed_fields_also_between_components():
  old, new = Outer(), Outer(rate=1.0, inner=Inner(colour=Blue()))
  changes = config_io.diff(old, new)
  assert changes["rate"] == (1e-4, 1.0)
  assert changes["inner.colour.kind"] == ("red", "blue")
  assert changes["inner.colour.depth"] == (1, "(absent)")
  assert config_io.diff(old, old) == {}


def test_a_component_outside_its_family_cannot_be_written():
  @dataclasses.dataclass(frozen=True)
  class Green:
    pass

  with pytest.raises(InputError, match="visible dict"):
    config_io.to_json(Outer(inner=Inner(colour=Green())))


def test_a_missing_required_field_is_named():
  @dataclasses.dataclass(frozen=True)
  class Needy:
    size: int

  with pytest.raises(InputError, match="needs the field 'size'"):
    config_io.from_plain(Needy, {})


@dataclasses.dataclass(frozen=True)
class Grown:
  depth: int = 1
  rounding: str = config_io.added("exact", before="loose")
  colour: Red | Blue = config_io.added(Blue(), before=Red(), family=COLOURS)


def test_a_file_without_a_field_that_was_added_means_what_it_meant():
  assert Grown().rounding == "exact"
  assert config_io.from_json(Grown, '{"depth": 2}') == Grown(2, "loose", Red())
  told = config_io.from_json(Grown, '{"rounding": "exact", "colour": {"kind": "blue"}}')
  assert told == Grown()


def test_a_recipe_with_added_fields_comes_back_and_can_be_overridden():
  assert config_io.from_json(Grown, config_io.to_json(Grown())) == Grown()
  changed = config_io.override(Grown(), [("depth", "3"), ("colour.shade", "0.25")])
  assert changed == Grown(3, "exact", Blue(0.25))


def test_what_stands_as_before_an_added_field_has_the_plain_values_of_before():
  assert config_io.to_plain(Grown(2, "loose", Red()), as_before=True) == {"depth": 2}
  new = config_io.to_plain(Grown(), as_before=True)
  assert new == config_io.to_plain(Grown())
  nested = config_io.to_plain((Grown(2, "loose", Blue()),), as_before=True)
  assert nested == [{"depth": 2, "colour": {"kind": "blue", "shade": 0.5, "tags": ["a"]}}]


@dataclasses.dataclass(frozen=True)
class Tree:
  parts: tuple[Grown, ...] = (Grown(), Grown(depth=2))


def test_a_recipe_of_today_becomes_that_of_the_run_it_began_where_fields_came_later():
  old, explicit = {"depth": 1}, {"depth": 2, "rounding": "loose", "colour": {"kind": "blue"}}
  begun = config_io.as_begun(Tree(), {"parts": [old, explicit]})
  assert begun == Tree((Grown(1, "loose", Red()), Grown(2, "loose", Blue())))
  assert config_io.as_begun(Tree(), config_io.to_plain(Tree())) == Tree()
  assert config_io.as_begun(Grown(rounding="wild"), {}) == Grown(1, "wild", Red())
  # Another list of parts is another recipe, whose differences are for others to tell.
  assert config_io.as_begun(Tree(), {"parts": [old]}) == Tree()


@dataclasses.dataclass(frozen=True)
class Needing:
  size: int


@dataclasses.dataclass(frozen=True)
class Perhaps:
  inner: Inner | None = None
  other: Needing | None = None


def test_an_override_of_a_record_that_is_none_makes_one_of_defaults():
  changes = [("inner.total", "9"), ("inner.colour.depth", "4")]
  for order in (changes, changes[::-1]):
    assert config_io.override(Perhaps(), order).inner == Inner(9, colour=Red(4))
  assert config_io.override(Perhaps(Inner(5)), changes[:1]).inner == Inner(9)
  assert config_io.override(Perhaps(Inner(5)), [("inner", "none")]) == Perhaps()
  with pytest.raises(InputError, match=r"config\.inner: unknown field of Inner 'totals'"):
    config_io.override(Perhaps(), [("inner.totals", "9")])
  with pytest.raises(InputError, match=r"config\.other: has no field 'size'; it holds None"):
    config_io.override(Perhaps(), [("other.size", "9")])
