"""launch.explain tells what a recipe needs, on devices that are not there, or one line."""

import importlib.util
import json
import re

import pytest

SMALL = ("--config.train.batch_size=8", "--config.data.seq_len=16")
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_a_step_on_eight_devices_is_told_as_text_and_as_json(here, tiny, tmp_path):
  file = tmp_path / "told.json"
  degrees = ("--config.parallel.data=2", "--config.parallel.fsdp=4")
  result = here("explain", tiny, "--devices=8", f"--json={file}", *SMALL, *degrees)
  assert result.code == 0, result.err
  lines = result.out.splitlines()
  assert lines[0].startswith("mesh  data=2 fsdp=4 expert=1 tensor=1  (8 x ")
  assert all(len(line) <= 80 for line in lines)
  found = json.loads(file.read_text())
  assert found["mesh"] == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
  compiled = found["compiled"]
  assert found["arguments"] == compiled["memory"]["arguments"] + compiled["unread"]
  assert found["held"]["batch"]["whole"] == 8 * found["held"]["batch"]["bytes"] == 5 * 8 * 16 * 4
  assert found["compiled"]["traffic"] and found["fits"] is None


def test_the_shape_of_a_public_model_is_told_on_devices_that_are_not_there(alone):
  result = alone(
    "explain", "--config=configs/qwen3_30b_a3b.py", "--devices=4", "--config.parallel.data=4",
    "--nocompile",
  )  # fmt: skip
  assert result.code == 0, result.err
  assert "mesh  data=4 fsdp=1 expert=1 tensor=1  (4 x cpu)" in result.out
  assert "layers/0..47/moe/experts/gate_up (48,128,2048,2,768)" in result.out
  assert "not compiled" in result.out


def test_devices_without_work_are_named(here, tiny):
  result = here("explain", tiny, "--devices=8", "--nocompile", "--config.parallel.data=2")
  assert result.code == 0, result
  said = " ".join(result.out.split())
  assert "6 of 8 devices are idle (cpu:2 to cpu:7)" in said and "parallel.data=8 uses all" in said


@pytest.mark.parametrize(
  "flags, words",
  [
    (
      ["--config.parallel.data=16", "--config.train.batch_size=16"],
      "asks for 16 devices .* or --devices=16",
    ),
    (["--devices=8", "--config.parallel.data=3", "--config.train.batch_size=8"], "multiple of 3"),
    (["--devices=-1"], "must not be negative"),
    (["--devices=8", "--topology=v5e:4x4"], "leave one"),
    (["--devices=9"], "JAX has started with 8"),
    (["--json=/no/such/folder/a.json"], "no folder"),
  ],
)
def test_bad_input_is_one_line_and_exit_2(here, tiny, flags, words):
  result = here("explain", tiny, *flags)
  assert result.code == 2 and result.out == ""
  (line,) = result.err.strip().splitlines()
  assert line.startswith("error: ")
  assert re.search(words, line), line


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_a_topology_without_libtpu_names_the_extra(here, tiny):
  result = here("explain", tiny, "--topology=v5e:4x4")
  assert result.code == 2
  assert "needs libtpu" in result.err and "jaxmoe[tpu]" in result.err


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is missing: pip install 'jaxmoe[tpu]'")
def test_the_tiny_step_compiles_for_chips_that_are_not_there_and_fits(alone, tiny, tmp_path):
  file = tmp_path / "told.json"
  degrees = ("--config.parallel.data=4", "--config.parallel.fsdp=4", "--config.train.batch_size=16")
  result = alone("explain", tiny, "--topology=v5e:4x4", f"--json={file}", *degrees)
  assert result.code == 0, result.err
  assert "(16 x TPU v5 lite)" in result.out and "it fits" in result.out
  found = json.loads(file.read_text())
  assert found["room"] == 16 * 2**30 and found["fits"] is True
  assert all(one["known"] for one in found["compiled"]["traffic"])  # no loop of unknown length


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is missing: pip install 'jaxmoe[tpu]'")
def test_there_a_ragged_exchange_sends_the_rows_that_are_there(alone, tiny, tmp_path):
  file = tmp_path / "told.json"
  asked = ("parallel.data=4", "parallel.expert=4", "train.batch_size=16", "kernels.exchange=ragged")
  changes = [f"--config.{change}" for change in asked]
  result = alone("explain", tiny, "--topology=v5e:4x4", f"--json={file}", *changes)
  assert result.code == 0, result.err
  kinds = {one["kind"] for one in json.loads(file.read_text())["compiled"]["traffic"]}
  assert "ragged-all-to-all" in kinds


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is missing: pip install 'jaxmoe[tpu]'")
def test_a_slice_that_does_not_exist_is_one_line(alone, tiny):
  result = alone("explain", tiny, "--topology=v5e:3x3")
  assert result.code == 2
  assert "give a slice such as v5e:4x4" in result.err.splitlines()[-1]


def test_a_pipeline_and_links_between_context_devices_are_told(here, tiny, tmp_path):
  links, file = tmp_path / "links.json", tmp_path / "told.json"
  way = {"latency_s": 1e-6, "bytes_per_s": 1e10}
  links.write_text(json.dumps({"topology": "full_mesh", "right": way, "left": way}))
  flags = ("--devices=4", "--nocompile", f"--json={file}", *SMALL)
  degrees = ("--config.parallel.pipe=2", "--config.parallel.context=2")
  degrees += ("--config.train.num_micro=2",)
  result = here("explain", tiny, *flags, *degrees, f"--links={links}")
  assert result.code == 0, result.err
  assert "pipeline 1f1b: 2 devices, 2 microbatches, 6 ticks" in result.out
  assert "over 2 context devices" in result.out and "takes least" in result.out
  assert all(len(line) <= 80 for line in result.out.splitlines())
  found = json.loads(file.read_text())
  assert found["pipeline"]["own"]["ticks"] == 6
  assert len(found["context"][0]["times"]) == 10
  del way["latency_s"]
  links.write_text(json.dumps({"topology": "full_mesh", "right": way, "left": way}))
  result = here("explain", tiny, *flags, *degrees, f"--links={links}")
  assert result.code == 2 and "has no right.latency_s" in result.err
  assert len(result.err.strip().splitlines()) == 1
