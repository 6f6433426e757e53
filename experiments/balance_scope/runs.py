"""Trains and tables: python -m experiments.balance_scope.runs --out=runs/balance_scope."""

import json
import pathlib
import random
import subprocess
import sys

import numpy as np
from absl import app, flags

from experiments.balance_scope.recipe import NUM_DOCUMENTS, SIZE, TASKS
from jaxmoe.data.sources import Synthetic

OUT = flags.DEFINE_string("out", "runs/balance_scope", "Where runs are written; they resume.")
SEEDS = flags.DEFINE_integer("seeds", 1, "How many seeds of each run.")
RECIPE = "experiments/balance_scope/recipe.py"


def write_mixed(path: pathlib.Path) -> None:
  """Writes the documents of all tasks in random order, a JSON line each."""
  lines = []
  for name in TASKS:
    task = Synthetic(task=name, size=SIZE, num_documents=NUM_DOCUMENTS)
    for index in range(NUM_DOCUMENTS):
      lines.append(json.dumps({"text": "".join(task.example(index)) + "\n"}))
  random.Random(0).shuffle(lines)
  path.write_text("\n".join(lines) + "\n")


def run(out: pathlib.Path, rows: str, scope: str, seed: int) -> tuple[float, float]:
  """Returns the divergence in bits, a mean over layers, and bits per byte, over the tasks."""
  workdir = out / f"{rows}-{scope}-{seed}"
  mixed = f",mixed={out / 'mixed.jsonl'}" if rows == "mixed" else ""
  command = [
    sys.executable, "-m", "launch.train", f"--config={RECIPE}:scope={scope}{mixed}",
    f"--workdir={workdir}", f"--config.train.seed={seed}",
  ]  # fmt: skip
  subprocess.run(command, check=True)
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["eval"]
  tables = last["routing"].values()
  bits = [last["domains"][task] for task in TASKS]
  return float(np.mean([divergence(table["counts"]) for table in tables])), float(np.mean(bits))


def divergence(counts: dict[str, list[int]]) -> float:
  """Returns the Jensen-Shannon divergence of the tasks' expert histograms, in bits, 0 to 2."""
  shares_DE = np.array([counts[task] for task in TASKS], float)
  shares_DE /= shares_DE.sum(1, keepdims=True)
  entropy = lambda share: -np.sum(share * np.log2(np.maximum(share, 1e-20)), axis=-1)  # noqa: E731
  return float(entropy(shares_DE.mean(0)) - entropy(shares_DE).mean())


def main(argv: list[str]) -> None:
  """Runs what is missing and prints the table."""
  del argv
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  write_mixed(out / "mixed.jsonl")
  table = {}
  for seed in range(SEEDS.value):
    for rows in ("pure", "mixed"):
      for scope in ("sequence", "global"):
        table.setdefault((rows, scope), []).append(run(out, rows, scope, seed))
  print("| rows | scope | divergence, bits | held-out bits per byte |\n| --- | --- | --- | --- |")
  for (rows, scope), values in table.items():
    each = [" / ".join(f"{value:.3f}" for value in column) for column in zip(*values)]
    print(f"| {rows} | {scope} | {each[0]} | {each[1]} |")


if __name__ == "__main__":
  app.run(main)
