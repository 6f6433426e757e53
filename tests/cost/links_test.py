import json

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.cost.links import LinkProfile, LinkRate, read_links, write_links

SLOW, FAST = LinkRate(1e-6, 1e9), LinkRate(2e-6, 4e9)
GOOD = {
  "topology": "torus",
  "right": {"latency_s": 1e-6, "bytes_per_s": 1e9},
  "left": {"latency_s": 0, "bytes_per_s": 2e9},
  "shape": [2, 4],
}


def test_a_profile_that_is_written_is_read_again(tmp_path):
  for profile in (LinkProfile("ring", SLOW, FAST), LinkProfile("torus", SLOW, FAST, (4, 2))):
    (tmp_path / "links.json").write_text(write_links(profile))
    assert read_links(str(tmp_path / "links.json")) == profile


@pytest.mark.parametrize(
  "path, value, message",
  [
    (["topology"], None, "has no topology"),
    (["right"], None, "has no right"),
    (["left", "bytes_per_s"], None, "has no left.bytes_per_s"),
    (["right", "latency_s"], None, "has no right.latency_s"),
    (["shape"], None, "has no shape"),
    (["topology"], "star", "none of full_mesh, ring, torus"),
    (["left", "bytes_per_s"], 0, "left.bytes_per_s=0 is no number"),
    (["left", "latency_s"], -1.0, "left.latency_s=-1.0 is no number"),
    (["left", "latency_s"], "1", "left.latency_s='1' is no number"),
    (["shape"], [4, 0], "no devices along each dim"),
  ],
)
def test_a_field_that_is_missing_or_wrong_is_named_in_one_line(tmp_path, path, value, message):
  record = json.loads(json.dumps(GOOD))
  holder = record
  for key in path[:-1]:
    holder = holder[key]
  if value is None:
    del holder[path[-1]]
  else:
    holder[path[-1]] = value
  file = tmp_path / "links.json"
  file.write_text(json.dumps(record))
  with pytest.raises(InputError, match=message) as found:
    read_links(str(file))
  assert "\n" not in str(found.value) and "links.json" in str(found.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "7"])
def test_what_is_no_profile_at_all_is_told_in_one_line(tmp_path, text):
  file = tmp_path / "links.json"
  file.write_text(text)
  with pytest.raises(InputError, match="links"):
    read_links(str(file))
  with pytest.raises(InputError, match="cannot be read"):
    read_links(str(tmp_path / "none.json"))


def test_messages_go_over_as_many_links_as_lie_between():
  mesh, ring = LinkProfile("full_mesh", SLOW, FAST), LinkProfile("ring", SLOW, FAST)
  torus = LinkProfile("torus", SLOW, FAST, (2, 4))
  assert [mesh.hops(distance, 8) for distance in range(8)] == [0] + [1] * 7
  assert [ring.hops(distance, 8) for distance in range(8)] == [0, 1, 2, 3, 4, 3, 2, 1]
  # The last of a row of four is one link from the first, and one from the next row.
  assert [torus.hops(distance, 8) for distance in range(8)] == [0, 2, 3, 2, 1, 2, 3, 2]


def test_times_are_latency_and_bytes_over_the_rate_of_the_way():
  ring = LinkProfile("ring", SLOW, FAST)
  assert ring.shift_s(1e6, 1, 4) == pytest.approx(1e-6 + 1e-3)
  assert ring.shift_s(1e6, -1, 4) == pytest.approx(2e-6 + 0.25e-3)
  assert ring.shift_s(1e6, 2, 4) == pytest.approx(2 * (1e-6 + 1e-3))
  mesh = LinkProfile("full_mesh", SLOW, SLOW)
  assert mesh.shift_s(1e6, -3, 4) == mesh.shift_s(1e6, 1, 4)
  assert mesh.exchange_s(4e6, 4) == pytest.approx(1e-6 + 1e-3)
  assert mesh.gather_s(1e6, 4) == pytest.approx(1e-6 + 1e-3)
  # On a ring of 4: 1 + 2 + 1 links, two at a time.
  assert LinkProfile("ring", SLOW, SLOW).exchange_s(4e6, 4) == pytest.approx(2 * (1e-6 + 1e-3))
  assert LinkProfile("ring", SLOW, SLOW).gather_s(1e6, 4) == pytest.approx(3 * (1e-6 + 0.5e-3))


def test_a_torus_of_other_devices_is_refused():
  with pytest.raises(InputError, match="give a shape of 4"):
    LinkProfile("torus", SLOW, SLOW, (2, 4)).check_size(4)
  LinkProfile("torus", SLOW, SLOW, (2, 4)).check_size(8)
