"""Trains and tables: python -m experiments.domain_fairness.runs --out=runs/domain_fairness."""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags

OUT = flags.DEFINE_string("out", "runs/domain_fairness", "Where runs are written; they resume.")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds of each run.")
RECIPE = "experiments/domain_fairness/recipe.py"
RUNS = ((0.0, "load"), (0.1, "load"), (0.1, "parity"))


def run(out: pathlib.Path, weight: float, target: str, seed: int) -> tuple[float, float]:
  """Returns the gap, a mean over layers, and held-out bits per byte, a mean over domains."""
  workdir = out / f"{weight}-{target}-{seed}"
  command = [
    sys.executable, "-m", "launch.train", f"--config={RECIPE}:weight={weight},target={target}",
    f"--workdir={workdir}", f"--config.train.seed={seed}",
  ]  # fmt: skip
  subprocess.run(command, check=True)
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["eval"]
  tables = last["routing"].values()
  bits = list(last["domains"].values())
  return float(np.mean([gap(table["counts"]) for table in tables])), float(np.mean(bits))


def gap(counts: dict[str, list[int]]) -> float:
  """Returns the largest less the smallest share a domain sends an expert, a mean over experts."""
  shares_DE = np.array(list(counts.values()), float)
  shares_DE /= shares_DE.sum(1, keepdims=True)
  return float(np.mean(shares_DE.max(0) - shares_DE.min(0)))


def main(argv: list[str]) -> None:
  """Runs what is missing and prints the table."""
  del argv
  out, table = pathlib.Path(OUT.value), {}
  for seed in range(SEEDS.value):
    for weight, target in RUNS:
      table.setdefault((target, weight), []).append(run(out, weight, target, seed))
  print("| target | weight | gap | held-out bits per byte | mean |")
  print("| --- | --- | --- | --- | --- |")
  for (target, weight), values in table.items():
    gaps, bits = (" / ".join(f"{value:.3f}" for value in column) for column in zip(*values))
    mean = np.mean([score for _, score in values])
    print(f"| {target} | {weight} | {gaps} | {bits} | {mean:.3f} |")


if __name__ == "__main__":
  app.run(main)
