"""Warm starts: a second process of a run traces and compiles nothing that a first one left it."""

import itertools
import json

import pytest

WATCHED = """
import importlib, json, pathlib, sys
import jax

command = importlib.import_module(f"jaxmoe.commands.{sys.argv.pop(1)}")
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
  command.run()
finally:
  file.write_text(json.dumps(seen))
"""
SHORT = ("train.num_steps=3", "evaluation.every=0", "samples.every=0")


@pytest.fixture(scope="module")
def watched(alone, tmp_path_factory):
  """Returns a function that runs a command with one cache, and tells what it traced and missed."""
  folder, numbers = tmp_path_factory.mktemp("warm"), itertools.count()

  def run(name, *flags):
    number = next(numbers)
    file, workdir = folder / f"{number}.json", folder / str(number)
    where = (
      () if any(flag.startswith("--workdir=") for flag in flags) else (f"--workdir={workdir}",)
    )
    program = ("-c", WATCHED, name, str(file), *flags)
    result = alone(name, *where, program=program, env={"XDG_CACHE_HOME": str(folder / "cache")})
    assert result.code == 0, result
    return workdir, {**json.loads(file.read_text()), "out": result.out}

  return run


@pytest.fixture(scope="module")
def trained_twice(watched, tiny):
  """Returns workdirs and events of a cold and a warm start."""
  return [watched("train", tiny, *(f"--config.{change}" for change in SHORT)) for _ in range(2)]


def lines_of(workdir):
  return (workdir / "metrics.jsonl").read_text().splitlines()


def test_a_warm_start_traces_nothing_of_ours_and_compiles_nothing(trained_twice):
  (_, cold), (_, warm) = trained_twice
  assert {"first_state", "step"} <= set(cold["traced"]) and cold["missed"]
  # In the place of a program that is kept stands an empty one until it is read.
  assert warm["traced"] == ["kept_first_state", "kept_step"]
  assert not warm["missed"]
  first, second = (
    [{**json.loads(line), "time": None} for line in lines_of(workdir)]
    for workdir, _ in trained_twice
  )
  assert first == second


def test_a_warm_generate_traces_no_program_of_the_model_and_compiles_nothing(
  watched, trained_twice
):
  run = f"--workdir={trained_twice[0][0]}"
  flags = (run, "--prompt=copy", "--max_tokens=3")
  cold, warm = (watched("generate", *flags, "--temperature=0")[1] for _ in range(2))
  greedy = {"begin_1_32", "read_last_1", "write_1"}
  assert greedy <= set(cold["traced"]) and cold["missed"]
  assert {f"kept_{name}" for name in greedy} <= set(warm["traced"])
  assert not greedy & set(warm["traced"]) and not warm["missed"]
  assert cold["out"] == warm["out"]
