import json

import jax
import pytest

from jaxmoe.commands import bench
from jaxmoe.core.errors import InputError
from jaxmoe.cost.link_probe import measure_links
from jaxmoe.cost.links import read_links


def test_links_between_devices_have_a_latency_and_a_rate_each_way():
  found = measure_links(jax.devices()[:2], "ring", rounds=1, large=64)
  assert found.topology == "ring"
  for way in (found.right, found.left):
    assert way.latency_s > 0 and way.bytes_per_s > 0


def test_one_device_has_no_links():
  with pytest.raises(InputError, match="with --devices=4"):
    measure_links(jax.devices()[:1], "ring", rounds=1)


def test_the_command_writes_a_profile_that_explain_reads(tmp_path, capsys, monkeypatch):
  small = lambda devices, topology, rounds: measure_links(devices, topology, rounds, 64)  # noqa: E731
  monkeypatch.setattr(bench, "measure_links", small)
  for name in bench.FLAGS:
    bench.FLAGS[name].unparse()
  path = tmp_path / "links.json"
  bench.FLAGS(["bench", f"--out={path}", "--topology=ring", "--repeats=1"])
  assert bench.main(["links"]) == 0
  assert "GB/s" in capsys.readouterr().out
  assert read_links(str(path)).topology == json.loads(path.read_text())["topology"] == "ring"
