"""What a second process of the same run traces and compiles: nothing that a first one left it."""

import json

WATCHED = """
import json, pathlib, sys
import jax
from jaxmoe.commands import train

file = pathlib.Path(sys.argv.pop(1))
seen = {"traced": [], "missed": []}

def begun():
  lines = file.with_suffix("") / "metrics.jsonl"
  return lines.exists() and lines.stat().st_size > 0

def timed(event, seconds, fun_name="", **about):
  if event == "/jax/core/compile/jaxpr_trace_duration" and not begun():
    seen["traced"].append(fun_name)

def counted(event, **about):
  if event == "/jax/compilation_cache/cache_misses":
    seen["missed"].append(event)

jax.monitoring.register_event_duration_secs_listener(timed)
jax.monitoring.register_event_listener(counted)
try:
  train.run()
finally:
  file.write_text(json.dumps(seen))
"""
SHORT = ("train.num_steps=3", "evaluation.every=0", "samples.every=0")


def test_a_warm_start_traces_nothing_of_ours_and_compiles_nothing(alone, tiny, tmp_path):
  seen, lines = [], []
  for number in range(2):
    file, workdir = tmp_path / f"{number}.json", tmp_path / str(number)
    program = ("-c", WATCHED, str(file), tiny, *(f"--config.{change}" for change in SHORT))
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = alone("train", f"--workdir={workdir}", program=program, env=env)
    assert result.code == 0, result
    seen.append(json.loads(file.read_text()))
    metrics = (workdir / "metrics.jsonl").read_text().splitlines()
    lines.append([{**json.loads(line), "time": None} for line in metrics])
  cold, warm = seen
  assert {"first_state", "step"} <= set(cold["traced"]) and cold["missed"]
  # In the place of a program that is kept stands an empty one until it is read.
  assert warm["traced"] == ["kept_first_state", "kept_step"]
  assert not warm["missed"]
  assert lines[0] == lines[1]
