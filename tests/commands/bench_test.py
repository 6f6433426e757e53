"""launch.bench: what it prints is a setting, and a mistake is one line."""

import json
import subprocess
import sys

import pytest

from jaxmoe.bench.expert_latency import family_of
from jaxmoe.commands import bench
from jaxmoe.moe.balance import LatencyAware
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.topk import Switch


def latency_of(capsys, *arguments):
  bench.FLAGS.unparse_flags()
  for name in bench.FLAGS:
    bench.FLAGS[name].unparse()
  sizes = ("--tokens=24", "--dim=4", "--mlp_dim=3", "--num_active=1", "--repeats=1")
  bench.FLAGS(["bench", *sizes, *arguments])
  assert bench.main(["latency"]) == 0
  return capsys.readouterr().out.strip()


@pytest.mark.parametrize("experts", ["dense,shift,shift,identity", "null", "zero_copy_constant"])
def test_the_latency_of_each_expert_is_a_setting_of_the_loss(experts, capsys):
  printed = latency_of(capsys, f"--experts={experts}", "--num_experts=4")
  term = eval(printed, {"LatencyAware": LatencyAware})
  assert len(term.latency) == 4
  MoEConfig(4, 1, router=Switch(), experts=family_of(experts, 3, 4), balance=(term,))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "expected one suite"),
    (["dinner"], "unexpected argument 'dinner'"),
    (["experts", "latency"], "expected one suite"),
    (["experts", "--tokens=0"], "at least 1"),
    (["experts", "--tokens=many"], "tokens"),
    (["experts", "--num_active=9", "--num_experts=8"], "above"),
    (["experts", "--dtype=int8"], "float32"),
    (["experts", "--repeats=0"], "at least 1"),
    (["experts", "--skew=-1"], "skew"),
    (["experts", "--skew=nan"], "skew"),
    (["latency", "--experts=dense,sift", "--num_experts=2"], "kinds must be of"),
    (["latency", "--experts=duo", "--num_experts=3", "--num_active=1"], "one number an expert"),
    (["latency", "--tokens=1", "--num_active=1"], "leaves no row"),
    (["experts", "--json=/no/such/folder/x.json"], "folder"),
    (["experts", "--colour=red"], "colour"),
    (["decode", "--rivals=vllm"], "vllm is not known here; there are: torch, llama_cpp"),
    (["step", "--shape=big"], "big is not known here; there are: quickstart, small8"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, here):
  result = here("bench", *arguments)
  assert result.code == 2
  assert result.err.count("\n") == 1 and message in result.err and not result.out


def test_what_the_memory_does_not_hold_is_one_line(here):
  result = here("bench", "experts", "--tokens=99999999999")
  assert result.code == 2
  assert result.err.startswith("error: there is not enough memory (Unable to allocate")
  assert result.err.count("\n") == 1


def test_the_command_needs_no_grain_and_no_orbax():
  code = "import sys; import jaxmoe.commands.bench; print({'grain', 'orbax'} & set(sys.modules))"
  shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert shown.stdout.strip() == "set()"


def test_what_is_counted_of_a_program_is_no_less_than_the_least(here, tmp_path):
  out = tmp_path / "rows.json"
  result = here("bench", "decode", "--shape=tiny", "--count", f"--json={out}")
  assert result.code == 0, result
  rows = json.loads(out.read_text())["rows"]
  assert [row["race"] for row in rows] == ["tiny, 1 row", "tiny, 16 rows", "tiny, prefill 480"]
  for row in rows:
    assert row["ideal_flops"] > 0 and row["bytes"] > 0.9 * row["ideal_bytes"] > 0
    # Of a loop whose length is found while it runs one pass is counted.
    assert row["flops"] >= row["ideal_flops"] or row["unknown_flops"]
    assert row["fusions"] > 0 and row["temp_bytes"] > 0 and "seconds" not in row
  # A token of one row has no other such loop inside: what is counted is all that it takes.
  assert rows[0]["flops"] <= 1.2 * rows[0]["ideal_flops"]
