"""A state cut over devices by hand, put together by rules; planted faults are found."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.checkpoint.universal import Rule, Union
from jaxmoe.core.errors import InputError

AXES = {"data": 2, "expert": 2, "tensor": 2}
RNG = np.random.default_rng(0)
Q, K, V, PADDED = 8, 2, 2, 12  # of grouped queries, and rows of a table of 11 ids


class Part(dict):
  """What one device wrote: arrays by name."""

  def shapes(self):
    return {name: x.shape for name, x in self.items()}

  def read(self, name):
    return self[name]


def whole_state():
  """A parameter of each kind, and its moments."""
  shapes = {"qkv": (Q + K + V, 4), "experts.up": (4, 3, 6), "experts.down": (4, 6, 3),
            "norm": (5,), "table": (11, 3), "o": (4, 8)}  # fmt: skip
  return {
    f"{name}{of}": RNG.random(shape, np.float32)
    for name, shape in shapes.items()
    for of in ("", ".exp_avg", ".exp_avg_sq")
  }


def cut(name, x, expert, tensor):
  """The part of a device, by slices that are written out."""
  kind = name.split(".exp_avg")[0]
  if kind == "qkv":
    q, k, v = x[:Q], x[Q : Q + K], x[Q + K :]
    return np.concatenate([q[4 * tensor : 4 * tensor + 4], k[tensor : tensor + 1],
                           v[tensor : tensor + 1]])  # fmt: skip
  if kind == "experts.up":
    return x[2 * expert : 2 * expert + 2, :, 3 * tensor : 3 * tensor + 3]
  if kind == "experts.down":
    return x[2 * expert : 2 * expert + 2, 3 * tensor : 3 * tensor + 3]
  if kind == "table":
    padded = np.concatenate([x, np.full((PADDED - 11, 3), 9, np.float32)])
    return padded[6 * tensor : 6 * tensor + 6]
  return x[:, 4 * tensor : 4 * tensor + 4] if kind == "o" else x


RULES = {
  "data": (Rule(".*", "replicate"),),
  "expert": (Rule(r"experts\..*", "fragment"), Rule("qkv|norm|table|o", "replicate")),
  "tensor": (
    Rule("qkv", "fragment", sub_widths=(Q, K, V)), Rule(r"experts\.up", "fragment", dim=2),
    Rule(r"experts\.down", "fragment", dim=1), Rule("norm", "replicate"),
    Rule("table", "fragment", pad=11), Rule("o", "fragment", dim=1),
  ),
}  # fmt: skip


@pytest.fixture
def state():
  return whole_state()


@pytest.fixture
def parts(state):
  return [
    Part({name: cut(name, x, expert, tensor) for name, x in state.items()})
    for _ in range(2) for expert in range(2) for tensor in range(2)
  ]  # fmt: skip


def same(union, state):
  """Whether all wholes are those of a state, bit for bit."""
  assert union.shapes.keys() == state.keys()
  return all(
    union.shapes[name] == x.shape
    and union.read(name).shape == x.shape
    and union.read(name).tobytes() == x.tobytes()
    for name, x in state.items()
  )


def changed(axis, pattern, **fields):
  """The rules with one of another kind."""
  rules = [dataclasses.replace(rule, **fields) if rule.pattern == pattern else rule
           for rule in RULES[axis]]  # fmt: skip
  assert tuple(rules) != RULES[axis]
  return {**RULES, axis: tuple(rules)}


def test_parts_of_three_axes_make_the_state(parts, state):
  assert same(Union(AXES, RULES, parts), state)


@pytest.mark.parametrize(
  "rules",
  [
    changed("tensor", "qkv", sub_widths=()), changed("tensor", "qkv", sub_widths=(4, 4, 4)),
    changed("tensor", "qkv", sub_widths=(2,) * 6), changed("tensor", "qkv", dim=1),
    changed("tensor", "table", pad=None), changed("tensor", "o", dim=0),
    changed("tensor", r"experts\.down", dim=2), changed("expert", r"experts\..*", dim=1),
  ],
  ids=("in order of rank", "even", "interleaved", "qkv dim", "padding", "o dim", "down dim",
       "expert dim"),
)  # fmt: skip
def test_a_wrong_rule_is_refused_or_makes_another_state(parts, state, rules):
  try:
    assert not same(Union(AXES, rules, parts), state)
  except InputError as error:
    assert "rule" in str(error)


def test_experts_of_devices_in_another_order_are_another_state(parts, state):
  parts[0], parts[2] = parts[2], parts[0]
  parts[4], parts[6] = parts[6], parts[4]
  assert not same(Union(AXES, RULES, parts), state)


def refused(words, axes=AXES, rules=RULES, parts=(), read=None):
  with pytest.raises(InputError, match=words) as caught:
    Union(axes, rules, parts).read(read)
  assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_one_line(parts):
  refused("7 devices wrote parts", parts=parts[:7])
  refused("rules are of", axes={"data": 2, "expert": 4}, parts=parts)
  twice = {**RULES, "data": (*RULES["data"], Rule("q.*", "replicate"))}
  refused(r"qkv: '\.\*' and 'q\.\*' along data", rules=twice, parts=parts)
  unused = {**RULES, "data": (*RULES["data"], Rule("bias", "replicate"))}
  refused("rule 'bias' along data names no tensor", rules=unused, parts=parts)
  refused("no rule along tensor", rules={**RULES, "tensor": RULES["tensor"][:-1]}, parts=parts)
  parts[5]["norm"] = parts[5]["norm"] + 1
  refused("norm: copies 0 and 1 differ", parts=parts, read="norm")
  del parts[3]["qkv.exp_avg"]
  refused("qkv.exp_avg: device 3 has no part", parts=parts)


def test_one_device_has_what_is_unique_and_a_mean_is_one():
  axes, rules = {"pipe": 2}, {"pipe": (Rule("[ab]", "unique"), Rule("c", "average"))}
  one, two = np.float32([1, 2]), np.float32([3, 6])
  union = Union(axes, rules, [Part(a=one, c=one), Part(b=two, c=two)])
  np.testing.assert_array_equal(union.read("a"), one)
  np.testing.assert_array_equal(union.read("b"), two)
  np.testing.assert_array_equal(union.read("c"), [2, 4])
  refused("on 2 devices", axes, rules, [Part(a=one, b=one, c=one), Part(b=two, c=two)], "b")


@pytest.mark.parametrize("number, due", ((4, (3, 3, 2, 2)), (3, (4, 3, 3))))
def test_widths_that_do_not_divide_go_to_the_first(number, due):
  whole = np.arange(20, dtype=np.float32).reshape(10, 2)
  parts = [Part(x=part) for part in np.split(whole, np.cumsum(due)[:-1])]
  rules = {"tensor": (Rule("x", "fragment", sub_widths=(10,)),)}
  assert Union({"tensor": number}, rules, parts).read("x").tobytes() == whole.tobytes()
  parts.reverse()
  refused("sub_widths of rule 'x' make", {"tensor": number}, rules, parts, "x")


@pytest.mark.parametrize(
  "fields",
  ({"kind": "odd"}, {"pattern": "("}, {"dim": -1}, {"pad": 0}, {"sub_widths": (0,)},
   {"kind": "replicate", "sub_widths": (1,)}),
  ids=("kind", "pattern", "dim", "pad", "width", "replicate"),
)  # fmt: skip
def test_a_rule_that_says_nothing_is_refused(fields):
  with pytest.raises(InputError, match="rule"):
    Rule(**{"pattern": "x", "kind": "fragment", **fields})
