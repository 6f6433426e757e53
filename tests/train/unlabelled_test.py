"""Long questions and short answers: most batches hold no token that is learned.

What spikes are told by are the last steps. Where nearly all of them (36 of 37, at six deviations)
have no loss and count as 0, any step that has one lies too far above them.
"""

import dataclasses
import json

import numpy as np
import pytest

from jaxmoe.core.config_io import override
from jaxmoe.core.layout import one_device
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.auto import source_at
from jaxmoe.optim import Cosine
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train import run_setup
from jaxmoe.train.run_options import RunResult
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.workdir import Workdir

STEPS, ROWS, LENGTH = 1200, 2, 32
CHANGES = {
  "model.dim": 16, "train.num_steps": STEPS, "train.batch_size": ROWS, "evaluation.every": 0,
  "samples.every": 0, "train.checkpoint_every": STEPS, "train.log_every": 400,
  "optim.learning_rate": 2e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
  """The recipe of a run on questions of about 4,000 bytes whose answers have two or three."""
  folder = tmp_path_factory.mktemp("text")
  rng = np.random.default_rng(0)
  with open(folder / "asked.jsonl", "w", encoding="utf-8") as file:
    for _ in range(100):
      question = " ".join(map(str, rng.integers(10, 99, rng.integers(1200, 1500))))
      answer = {"role": "assistant", "content": ("yes", "no")[rng.integers(2)]}
      said = [{"role": "user", "content": question}, answer]
      file.write(json.dumps({"messages": said}) + "\n")
  tiny = load_recipe("configs/tiny.py", [])
  data = Data(parts=(MixturePart(source_at(str(folder))),), seq_len=LENGTH)
  optim = dataclasses.replace(tiny.optim, schedule=Cosine(warmup_steps=2))
  made = dataclasses.replace(tiny, data=data, optim=optim)
  return override(made, [(path, str(value)) for path, value in CHANGES.items()])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_on_short_answers_learns_and_skips_no_step(asked, tmp_path, monkeypatch, seed):
  monkeypatch.setattr(run_setup, "kept_peak", lambda dtype, folder: 1e12)
  train = dataclasses.replace(asked.train, seed=seed)
  recipe, workdir = dataclasses.replace(asked, train=train), Workdir(tmp_path)
  try:
    outcome = Trainer(recipe, workdir, open_corpus(recipe.data), one_device()).fit()
  finally:
    workdir.release()
  lines = [json.loads(line) for line in workdir.metrics.read_text().splitlines()]
  losses = [line["loss"] for line in lines]
  empty = sum(loss is None for loss in losses)
  learned = [loss for loss in losses if loss is not None]
  print(f"seed {seed}: {empty} of {STEPS} steps without labels, {lines[-1]['skipped']} skipped")
  print(f"losses {learned}")
  assert outcome == RunResult(STEPS, done=True)
  assert 0.95 * STEPS < empty == lines[-1]["unlabelled"] < STEPS - 9
  assert lines[-1]["skipped"] == 0
  assert learned[0] > 5 and np.mean(learned[-5:]) < 2
