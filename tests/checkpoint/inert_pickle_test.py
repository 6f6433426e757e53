"""Pickles are read as plain data: what would be run is a record, what is damaged is one line."""

import collections
import os
import pickle
import random

import pytest

from jaxmoe.checkpoint.inert_pickle import Name, Record, read_pickle
from jaxmoe.core.errors import InputError

PLAIN = {
  "numbers": [0, 1, -1, 255, 256, 65535, -(2**31), 2**31, 2**70, -(2**70), 0.1, float("inf")],
  "text": ["", "a", "ä" * 300], "bytes": [b"", b"x" * 300], "both": (True, False, None),
  "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4, [5]))], "sets": [{1, 2}, frozenset({3})],
  3: {"nested": {"deeper": [{}, []]}},
}  # fmt: skip
CALLS = {"collections.OrderedDict": lambda pairs=(): dict(pairs)}


class Runs:
  """An object whose pickle runs a command."""

  def __init__(self, *command):
    self.command = command

  def __reduce__(self):
    return os.system, self.command


class Kept:
  """An object with attributes."""

  def __init__(self, **fields):
    self.__dict__.update(fields)


def read(data, calls=CALLS, persistent=None):
  return read_pickle(data, "here", calls, persistent)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(protocol):
  tree = {**PLAIN, "sets": []} if protocol < 4 else PLAIN
  tree = {**tree, "bytes": []} if protocol < 3 else tree
  assert read(pickle.dumps(tree, protocol)) == tree
  shared = [1]
  one, other = read(pickle.dumps([shared, shared], protocol))
  assert one is other
  ordered = collections.OrderedDict(b=1, a=2)
  assert list(read(pickle.dumps(ordered, protocol)).items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(protocol, tmp_path):
  found = read(pickle.dumps({"x": Runs(f"touch {tmp_path}/ran")}, protocol))["x"]
  assert isinstance(found, Record) and found.of.name == "system"
  assert found.arguments == (f"touch {tmp_path}/ran",)
  assert not (tmp_path / "ran").exists()


def test_an_object_is_a_record_of_its_state():
  found = read(pickle.dumps(Kept(a=1, b=[2])))
  assert isinstance(found, Record) and found.state == {"a": 1, "b": [2]}
  assert read(pickle.dumps(Kept)) == Name(Kept.__module__, "Kept")
  counted = read(pickle.dumps(collections.defaultdict(int, a=1)))
  assert counted.items == {"a": 1} and str(counted.of) == "collections.defaultdict"


def test_what_a_call_refuses_is_damage():
  def refuses(*_):
    raise ValueError("no such thing")

  with pytest.raises(InputError, match=r"here: no pickle of plain data \(no such thing\)"):
    read(pickle.dumps(collections.OrderedDict()), {"collections.OrderedDict": refuses})


@pytest.mark.parametrize(
  "data",
  [b"", b"\x80", b"no pickle", b".", b"(.", b"\x80\x02]", b"\x80\x04\x82\x01.", b"Pid\n.",
   b"\x80\x02Q.", b"a.", b"\x85.", b"\x80\x02K\x01K\x02a.", b"}K\x01.", b"h\x05.", b"t.",
   b"\x80\x02]}K\x01s.", b"(K\x01d.", b"c\n.", b"K\x01K\x02R.", b"\x80\x04K\x01K\x02\x93."],
)  # fmt: skip
def test_streams_that_say_nothing_are_one_line(data):
  with pytest.raises(InputError) as caught:
    read(data)
  assert "\n" not in str(caught.value)


def test_damage_of_any_kind_is_an_input_error_or_data():
  whole, rng = pickle.dumps({**PLAIN, "run": Runs("true"), "kept": Kept(a=[1])}), random.Random(0)
  for _ in range(3000):
    spoiled = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
      spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
    try:
      read(bytes(spoiled[: rng.choice((None, rng.randrange(len(spoiled))))]))
    except InputError:
      continue


def test_depth_is_no_harm():
  deep = b"]" + b"\x85" * 200_000
  assert isinstance(read(deep + b"."), tuple)
  for data in (b"}" + deep + b"K\x01s.", b"(" + deep + b"\x91.", b"\x8f(" + deep + b"\x90."):
    with pytest.raises(InputError, match="a key that is a tuple"):  # hashed to its depth it crashes
      read(data)
