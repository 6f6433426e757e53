"""What a run is computed by: refused before anything compiles, told at its start."""

import dataclasses

import jax
import pytest

from jaxmoe.core.backends import Choice
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.parallel import make_layout
from jaxmoe.report.run_data import read_run_data
from jaxmoe.report.sections.run_config import run_config
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.kernel_choices import tell_kernels
from jaxmoe.train.run_log import RunLog, read_lines
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.workdir import Workdir

FIRST = (
  Choice("expert_mlp", "rows", "asked for"), Choice("grouped_matmul", "blocks", "the first"),
)  # fmt: skip
THEN = (Choice("expert_mlp", "fused", "the first"), Choice("expert_mlp", "few", "few rows"))


@pytest.fixture
def told(tmp_path, observers):
  """Returns what tells choices, what was said, and the file of events."""
  log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "events.jsonl")
  here = dataclasses.replace(observers, log=log)
  events = tmp_path / "events.jsonl"
  return lambda choices: tell_kernels(here, events, choices), here.display.said, events


def test_each_choice_is_a_line_and_a_change_is_told(told):
  tell, said, file = told
  tell(FIRST)
  assert said == [
    "kernel expert_mlp: rows (asked for)", "kernel grouped_matmul: blocks (the first)"
  ]  # fmt: skip
  tell(FIRST)
  assert len(said) == 4, "the same again is no change"
  tell(THEN)
  assert said[-1] == (
    "kernel expert_mlp was rows: from here on numbers may differ by rounding"
  )
  events = list(read_lines(file))
  assert [event["event"] for event in events] == ["kernels"] * 3
  assert events[0]["chosen"][0] == {
    "operation": "expert_mlp", "backend": "rows", "why": "asked for"
  }
  assert ["changed" in event for event in events] == [False, False, True]
  assert events[2]["changed"] == {"expert_mlp": ["rows"]}


def test_a_back_end_that_does_not_fit_is_refused_before_anything_compiles(tmp_path, monkeypatch):
  asked = load_recipe("tiny", ["--config.parallel.expert=2", "--config.kernels.exchange=ragged"])
  monkeypatch.setattr(jax.stages.Lowered, "compile", None)
  workdir = Workdir(tmp_path / "run")
  layout = make_layout(asked.parallel)
  with pytest.raises(InputError, match=r"exchange=ragged is for tpu and gpu.*; what fits: auto, p"):
    Trainer(asked, workdir, open_corpus(asked.data), layout)
  assert not workdir.path.exists()


def test_the_report_has_the_back_ends_of_the_last_start(told):
  tell, _, file = told
  tell(FIRST)
  tell(THEN)
  page = str(run_config(read_run_data(file.parent)))
  assert "few rows" in page and "asked for" not in page
