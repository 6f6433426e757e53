"""Starting: from nothing to the first step of `tiny`, and to the first token that is written.

What has been run before here has kept its programs: a warm start. It is held against importing the
packages that any training needs. Counted are events: what JAX traced, and what it had to compile.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import tempfile
from collections.abc import Mapping
from functools import partial

from jaxmoe.bench.race import Run, Seconds, race
from jaxmoe.bench.results import Row, RowFile
from jaxmoe.bench.sides.first_sign import first_sign
from jaxmoe.bench.sides.process import ROOT
from jaxmoe.bench.suite import Asked

IMPORTS = "import jax, flax.nnx, optax, orbax.checkpoint, grain"
_FLAGS = ("--config=tiny", "--config.evaluation.every=0", "--config.samples.every=0")
_ONCE = (*_FLAGS, "--config.train.num_steps=1", "--config.optim.schedule.warmup_steps=0")
_WRITE = ("--prompt=copy", "--max_tokens=2", "--temperature=0")


def run(asked: Asked, results: RowFile) -> None:
  """Races warm starts with the imports, or counts the events of cold and warm ones."""
  if results.has("tiny"):
    return
  with tempfile.TemporaryDirectory() as folder:
    here = pathlib.Path(folder)
    path = ":".join(filter(None, [str(ROOT), asked.env.get("PYTHONPATH")]))
    env = {**asked.env, "XDG_CACHE_HOME": str(here / "cache"), "PYTHONPATH": path}
    rows = _counted(asked, here, env) if asked.count else _raced(asked, here, env)
  results.add("tiny", rows)


def _raced(asked: Asked, here: pathlib.Path, env: Mapping[str, str]) -> list[Row]:
  python, numbers = asked.pythons[0], itertools.count()
  entry = (python, "-m", "jaxmoe.commands.entry")
  done = here / "done"
  asked.say("training a run to write with ...")
  first_sign([*entry, "train", *_ONCE, f"--workdir={done}"], env)

  def train() -> Seconds:
    workdir = here / f"run{next(numbers)}"
    return first_sign([*entry, "train", *_FLAGS, f"--workdir={workdir}"], env,
                      workdir / "metrics.jsonl")  # fmt: skip

  generate = partial(first_sign, [*entry, "generate", *_WRITE, f"--workdir={done}"], env)
  runs: dict[str, Run] = {"imports": partial(first_sign, [python, "-c", IMPORTS], env)}
  runs |= {"train, first step": train, "generate, 2 tokens": generate}
  asked.say(f"timing {', '.join(runs)} ...")
  return race(runs, "imports", asked.rounds)


def _counted(asked: Asked, here: pathlib.Path, env: Mapping[str, str]) -> list[Row]:
  """Returns the events of a cold and a warm start of both commands."""
  rows = []
  for number, how in enumerate(("cold", "warm")):
    workdir = here / f"run{number}"
    for name, flags in (("train", _ONCE), ("generate", _WRITE)):
      asked.say(f"{name}, {how} ...")
      out = here / "events.json"
      probe = [asked.pythons[0], "-m", "jaxmoe.commands.start_probe", str(out), name]
      first_sign([*probe, *flags, f"--workdir={workdir}"], env)
      rows.append({"name": f"{name}, {how}", **json.loads(out.read_text(encoding="utf-8"))})
  return rows
