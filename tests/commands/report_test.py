import html
import json
import shutil

import pytest


@pytest.fixture
def run(trained, tmp_path):
  """Returns a copy of the short finished run."""
  return shutil.copytree(trained, tmp_path / "run")


def test_a_run_leaves_its_report_and_the_command_writes_it_again(here, run):
  left = (run / "report.html").read_text()
  (run / "report.html").unlink()
  result = here("report", f"--workdir={run}")
  assert result.code == 0 and str(run / "report.html") in result.out
  again = (run / "report.html").read_text()
  assert "Training loss" in again and "Domain x expert, layer 1" in again
  assert left.replace("trained", "x").count("<figure") == again.count("<figure")


def test_several_runs_are_laid_over_each_other(here, run, tmp_path):
  other = shutil.copytree(run, tmp_path / "other")
  out = tmp_path / "both.html"
  result = here("report", f"--workdir={run}", f"--workdir={other}", f"--out={out}")
  assert result.code == 0
  assert "Comparison of runs" in out.read_text()
  assert here("report", f"--workdir={run}", f"--workdir={other}").code == 0
  assert (run / "comparison.html").is_file()


@pytest.mark.parametrize(
  "arguments, why",
  [((), "--workdir is missing"), (("--workdir=nowhere",), "no run here"),
   (("--workdir=RUN", "--out=RUN/no/such/page.html"), "no folder"),
   (("--workdir=RUN", "--out=RUN"), "is a folder"),
   (("--workdir=RUN", "--out=RUN/metrics.jsonl"), "metrics.jsonl, which is read")],
)  # fmt: skip
def test_what_cannot_be_told_is_one_line(here, run, arguments, why):
  result = here("report", *(argument.replace("RUN", str(run)) for argument in arguments))
  assert result.code == 2
  assert why in result.err and len(result.err.splitlines()) == 1


def test_the_folder_of_a_model_or_of_somebody_s_files_is_no_run_to_write_into(here, tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "olmoe", "data": 1}')
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "time": 17.0}\n')
  (tmp_path / "report.html").write_text("mine")
  result = here("report", f"--workdir={tmp_path}")
  assert result.code == 2 and "no run here" in result.err
  assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.slow
def test_a_run_without_balance_says_which_of_its_experts_died_and_when(alone, tiny, tmp_path):
  moe = "--config.model.stack.0.pattern.0.ffn"
  result = alone(
    "train", tiny, f"--workdir={tmp_path / 'run'}", f"{moe}.num_experts=16", f"{moe}.num_active=1",
    f"{moe}.balance.0.weight=0", f"{moe}.balance.1.weight=0", "--config.train.num_steps=400",
    "--config.optim.learning_rate=0.003",
  )  # fmt: skip
  assert result.code == 0, result.err
  lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  last = {}
  for line in lines:
    for layer, of in line["layers"].items():
      for expert, share in enumerate(of["load"]):
        last.setdefault((layer, expert), 0)
        if share:
          last[layer, expert] = line["step"]
  dead = {place: step for place, step in last.items() if step <= 380}
  assert dead, "without balance some expert starves"
  page = html.unescape((tmp_path / "run" / "report.html").read_text())
  for (layer, expert), step in dead.items():
    since = f"has had no token since step {step}" if step else "has never had a token"
    assert f"layer {layer}: expert {expert} {since}" in page
  assert page.count("has had no token since step") >= len([step for step in dead.values() if step])
