"""The commands on one small trained run: what they print and write, and that they repeat."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmoe.commands import generate as generate_command
from jaxmoe.commands.process import jax_settings, run_flags
from jaxmoe.core.config_io import from_json
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.runs.generation import TextStream
from jaxmoe.train import console_progress, progress
from jaxmoe.train.experiment import Experiment

COMMANDS = ("train", "evaluate", "generate", "score", "status", "doctor")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@pytest.fixture
def run(trained, tmp_path):
  """Returns a copy of the trained run that a test may change."""
  shutil.copytree(trained, tmp_path / "run")
  return tmp_path / "run"


@pytest.fixture(scope="module")
def loaded(trained):
  """Returns what the commands read of the run."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax_settings, "set_up_jax", lambda keep_memory=True: None)
    return run_flags.load_run(str(trained))


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def read_npz(path):
  with np.load(path) as arrays:
    return dict(arrays)


# Training.


def test_a_run_leaves_the_files_of_the_contract(trained):
  names = {"config.json", "metrics.jsonl", "events.jsonl", "samples.md", "checkpoints"}
  assert names <= {path.name for path in trained.iterdir()}
  lines = lines_of(trained / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert [line["step"] for line in lines if "eval" in line] == [3, 6]
  for line in lines:
    assert {"tokens_per_s", "mfu", "seconds"} <= line["time"].keys()
    assert {"load", "load_entropy", "drop_rate", "dead"} <= line["layers"]["1"].keys()
  assert (trained / "samples.md").read_text().startswith("## step 0\n")


def test_a_finished_run_run_again_changes_no_number(here, run, again):
  names = ("metrics.jsonl", "samples.md", "config.json")
  before = {name: (run / name).read_bytes() for name in names}
  result = here("train", *again, f"--workdir={run}")
  assert result.code == 0, result
  assert "nothing to do: step 6 of 6" in result.out
  assert "note: 7 of 8 devices are idle" in result.out
  assert {name: (run / name).read_bytes() for name in names} == before
  done = [event["digest"] for event in lines_of(run / "events.jsonl") if event["event"] == "done"]
  assert len(done) == 2
  assert done[0] == done[1]


def test_more_steps_are_a_safe_change_that_goes_on_and_is_written_down(here, run, again):
  # The learning rate of the steps to come depends on the number of steps, which is said before the
  # first of them; those made stay.
  before = (run / "metrics.jsonl").read_bytes()
  config = [argument.replace("num_steps=6", "num_steps=8") for argument in again]
  result = here("train", *config, "--config.train.log_every=1", f"--workdir={run}")
  assert result.code == 0, result
  assert "going on from step 6" in result.out
  assert "step 8/8" in result.out
  rate = lines_of(run / "metrics.jsonl")[6]["learning_rate"]
  said = f"the learning rate goes from 0.0001 to {rate:.3g} here"
  assert rate > 2e-4 and -1 < result.out.find(said) < result.out.find("step 7/8")
  (event,) = [e for e in lines_of(run / "events.jsonl") if e["event"] == "learning_rate"]
  assert (event["due"], event["now"]) == (pytest.approx(1e-4), pytest.approx(rate))
  assert "with --config.optim.schedule.earlier_ends=6 it goes on from 0.0001" in result.out
  assert "and --config.optim.schedule.earlier_ends=8," in result.out
  assert (run / "metrics.jsonl").read_bytes().startswith(before)
  assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == list(range(1, 9))
  experiment = from_json(Experiment, (run / "config.json").read_text())
  assert experiment.train.num_steps == 8
  assert experiment.train.log_every == 1


def test_a_refused_change_leaves_the_run_as_it_was(here, run, again):
  before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
  assert here("train", *again, "--config.train.seed=9", f"--workdir={run}").code == 2
  assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# Evaluation.


def test_evaluate_prints_and_writes_the_contract_s_fields(here, run, trained):
  result = here("evaluate", f"--workdir={run}")
  assert result.code == 0, result
  scores = json.loads((run / "eval.json").read_text())
  assert list(scores)[:3] == ["step", "bits_per_byte", "domains"]
  assert scores["step"] == 6
  assert set(scores["domains"]) == {"copy", "recall", "add", "brackets"}
  assert all(1 < bits < 12 for bits in scores["domains"].values())
  low, high = min(scores["domains"].values()), max(scores["domains"].values())
  assert low < scores["bits_per_byte"] < high
  assert set(scores["compressors"]) == {"gzip -9", "xz -9"}
  for domain, bits in scores["domains"].items():
    assert re.search(rf"{domain} .*{bits:.3f}", result.out)
  # At 2,000 bytes a domain the scores on the way are those of all held-out documents.
  on_the_way = lines_of(trained / "metrics.jsonl")[-1]["eval"]
  assert on_the_way["domains"] == pytest.approx(scores["domains"], rel=1e-6)


def test_evaluating_twice_gives_the_same_file_whatever_the_batch(here, run):
  written = []
  for size in (16, 16, 3):
    assert here("evaluate", f"--workdir={run}", f"--batch_size={size}").code == 0
    written.append(json.loads((run / "eval.json").read_text()))
  assert written[0] == written[1]
  assert written[0]["domains"] == pytest.approx(written[2]["domains"], rel=1e-6)


# Scores.


def test_score_writes_the_log_probability_of_each_next_id(here, run, tmp_path):
  ids_BL = np.random.default_rng(0).integers(0, 257, (3, 24)).astype(np.int32)
  np.save(tmp_path / "ids.npy", ids_BL)
  flags = (f"--workdir={run}", f"--ids={tmp_path}/ids.npy", f"--out={tmp_path}/scores.npz")
  result = here("score", *flags, "--logits")
  assert result.code == 0, result
  scores = read_npz(tmp_path / "scores.npz")
  assert scores["logprobs"].shape == (3, 23)
  assert scores["logits"].shape == (3, 24, 257)
  assert scores["logprobs"].dtype == scores["logits"].dtype == np.float32
  logits_BLV = scores["logits"].astype(np.float64)
  logprobs_BLV = logits_BLV - np.log(np.exp(logits_BLV).sum(-1, keepdims=True))
  expected_BL = np.take_along_axis(logprobs_BLV[:, :-1], ids_BL[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(scores["logprobs"], expected_BL, rtol=1e-5, atol=1e-6)
  assert here("score", *flags).code == 0
  again = read_npz(tmp_path / "scores.npz")
  assert list(again) == ["logprobs"]
  np.testing.assert_array_equal(again["logprobs"], scores["logprobs"])


def test_a_row_s_scores_do_not_depend_on_the_other_rows(here, run, tmp_path):
  ids_BL = np.random.default_rng(1).integers(0, 257, (2, 10)).astype(np.int32)
  logprobs = []
  for rows in (ids_BL, ids_BL[1:]):
    np.save(tmp_path / "ids.npy", rows)
    flags = (f"--ids={tmp_path}/ids.npy", f"--out={tmp_path}/scores.npz")
    assert here("score", f"--workdir={run}", *flags).code == 0
    logprobs.append(read_npz(tmp_path / "scores.npz")["logprobs"])
  np.testing.assert_array_equal(logprobs[0][1:], logprobs[1])
  assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".npy", ".npz"}


@pytest.fixture(scope="module")
def recorded(trained, here, tmp_path_factory):
  """Returns flags of the ids and the scores, and a routing that was recorded with them."""
  folder = tmp_path_factory.mktemp("recorded")
  ids_BL = np.random.default_rng(0).integers(0, 257, (3, 24)).astype(np.int32)
  np.save(folder / "ids.npy", ids_BL)
  flags = (f"--workdir={trained}", f"--ids={folder}/ids.npy", f"--out={folder}/scores.npz")
  routing = folder / "routing.npz"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax_settings, "set_up_jax", lambda keep_memory=True: None)
    result = here("score", *flags, "--logits", f"--record_routing={routing}")
  assert result.code == 0, result
  assert {path.name for path in folder.iterdir()} == {"ids.npy", "scores.npz", "routing.npz"}
  return flags, routing, read_npz(folder / "scores.npz")


def test_replayed_routing_gives_the_recorded_scores_bit_for_bit(here, recorded):
  flags, routing, scores = recorded
  assert here("score", *flags, "--logits", f"--replay_routing={routing}").code == 0
  again = read_npz(flags[2].removeprefix("--out="))
  for name in ("logprobs", "logits"):
    np.testing.assert_array_equal(again[name], scores[name])
  assert here("score", *flags).code == 0
  # Another compiled program, the same formula.
  alone = read_npz(flags[2].removeprefix("--out="))["logprobs"]
  np.testing.assert_allclose(alone, scores["logprobs"], rtol=1e-5, atol=1e-6)


def test_replayed_routing_is_what_tokens_take_whatever_the_routers_say(here, recorded, tmp_path):
  flags, routing, scores = recorded
  content = read_npz(routing)
  assert content["choices"].shape[1:3] == (3, 24)
  content["choices"][:, 1] = np.roll(content["choices"][:, 1], 5, axis=1)
  np.savez(tmp_path / "other.npz", **content)
  assert here("score", *flags, f"--replay_routing={tmp_path}/other.npz").code == 0
  other = read_npz(flags[2].removeprefix("--out="))["logprobs"]
  np.testing.assert_array_equal(other[[0, 2]], scores["logprobs"][[0, 2]])
  assert np.abs(other[1] - scores["logprobs"][1]).max() > 1e-4


# Generation.


def test_generate_repeats_with_its_seed_and_differs_with_another(here, trained):
  flags = (f"--workdir={trained}", "--prompt=copy: a", "--max_tokens=24", "--temperature=1")
  texts = [here("generate", *flags, f"--seed={seed}").out for seed in (1, 1, 2)]
  assert texts[0] == texts[1]
  assert texts[0] != texts[2]
  assert all(text.startswith("copy: a") and len(text) > 12 for text in texts)


def test_greedy_text_does_not_depend_on_the_seed(here, trained):
  flags = (f"--workdir={trained}", "--prompt=copy: a", "--max_tokens=8", "--temperature=0")
  texts = {here("generate", *flags, f"--seed={seed}").out for seed in (1, 2)}
  assert len(texts) == 1


def test_several_prompts_are_written_one_after_the_other(here, trained, loaded):
  prompts = ["add: 12+34 -> ", "copy: xyz", "é"]
  flags = [f"--prompt={prompt}" for prompt in prompts]
  result = here("generate", f"--workdir={trained}", *flags, "--max_tokens=6", "--seed=3")
  tokenizer = loaded.tokenizer
  ids = [np.array([256, *tokenizer.encode(prompt)], np.int32) for prompt in prompts]
  sampling = Sampling(max_tokens=6, temperature=0.8, top_p=0.95, seed=3)
  rows = generate(loaded.decoder, loaded.params, ids, sampling, (64, 256))
  expected = "".join(
    f"--- {number} of 3\n{prompt}{tokenizer.decode(row)}\n"
    for number, (prompt, row) in enumerate(zip(prompts, rows), 1)
  )
  assert result.out == expected


class Letters:
  """A tokenizer whose ids are bytes."""

  def decode(self, ids):
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.fixture
def printer():
  """Returns a function that makes the stream of launch.generate."""
  return lambda tokenizer, prompts: TextStream(tokenizer, prompts, generate_command.show)


def test_text_is_shown_as_soon_as_its_characters_are_whole(printer, capsys):
  shown, stream = [], printer(Letters(), ["> "])
  capsys.readouterr()
  for byte in "aé€".encode():
    stream.token(0, byte)
    shown.append(capsys.readouterr().out)
  assert shown == ["a", "", "é", "", "", "€"]


def test_a_later_row_waits_for_its_turn(printer, capsys):
  stream = printer(Letters(), ["1:", "2:"])
  for row, byte in ((1, b"x"), (0, b"a"), (1, b"y"), (0, b"b")):
    stream.token(row, byte[0])
  assert capsys.readouterr().out == "--- 1 of 2\n1:ab"
  stream.finish()
  assert capsys.readouterr().out == "\n--- 2 of 2\n2:xy\n"


def test_a_terminal_is_shown_escapes_and_a_file_gets_the_text(printer, capsys, monkeypatch):
  for on_terminal, text in ((True, r"\x1b[1m a\x05b"), (False, "\x1b[1m a\x05b")):
    monkeypatch.setattr(sys.stdout, "isatty", lambda on_terminal=on_terminal: on_terminal)
    stream = printer(Letters(), ["\x1b[1m "])
    for byte in b"a\x05b":
      stream.token(0, byte)
    stream.finish()
    assert capsys.readouterr().out == f"{text}\n"


def test_an_error_of_one_line_controls_no_terminal(here, tmp_path):
  result = here("status", f"--workdir={tmp_path}/\x1b[2Jx")
  assert result.code != 0 and r"\x1b[2Jx" in result.err and "\x1b" not in result.err


# What is seen.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_flag_with_its_default(here, name):
  result = here(name, "--help")
  assert result.code == 0
  assert result.err == ""
  assert f"python -m launch.{name}" in result.out
  defaults = {
    "generate": {"max_tokens": "128", "temperature": "0.8", "top_p": "0.95", "seed": "0"},
    "evaluate": {"batch_size": "16"},
    "score": {"logits": "false"},
    "train": {},
    "status": {"watch": "0.0"},
    "doctor": {"workdir": "runs"},
  }
  flags = {
    "train": ["config", "workdir", "sinks", "profile_steps"],
    "evaluate": ["workdir"],
    "generate": ["workdir", "prompt"],
    "score": ["workdir", "ids", "out"],
    "status": ["workdir"],
    "doctor": ["workdir", "out"],
  }
  for flag in flags[name]:
    assert f"--{flag}:" in result.out
  for flag, default in defaults[name].items():
    assert re.search(rf"--(\[no\])?{flag}:[^-]*\(default: '{default}'\)", result.out), flag
  if name == "train":
    assert "--config.train.num_steps" in result.out


def test_what_goes_into_a_pipe_has_no_control_characters_and_comes_at_once(
  started, again, tmp_path
):
  process = started("train", *again, "--config.train.log_every=1", f"--workdir={tmp_path}/w")
  first = process.stdout.readline()
  assert process.poll() is None, "lines are seen while the run goes on"
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert err == ""
  assert not CONTROL.search(first + out)
  lines = (first + out).splitlines()
  assert [line for line in lines if line.startswith("step ")][-1].startswith("step 6/6  loss ")
  assert "compiling train_step ..." in lines


def test_a_reader_that_goes_away_leaves_no_traceback(started, trained):
  flags = (f"--workdir={trained}", "--prompt=copy: a", "--max_tokens=40")
  process = started("generate", *flags)
  process.stdout.close()
  err = process.stderr.read()
  process.stderr.close()
  process.wait(timeout=300)
  assert err == ""
  assert process.returncode == 141


def seen_on_a_terminal(command, env, columns=80):
  """Returns what a command writes to a terminal of so many columns, and its exit code."""
  leader, follower = pty.openpty()
  size = f"stty cols {columns} rows 24; exec "
  line = size + " ".join(f"'{part}'" for part in command)
  process = subprocess.Popen(
    ["sh", "-c", line], stdin=follower, stdout=follower, stderr=follower, env=env
  )
  os.close(follower)
  text, end = b"", time.monotonic() + 300
  while time.monotonic() < end:
    ready, _, _ = select.select([leader], [], [], 1)
    try:
      part = os.read(leader, 65536) if ready else b" " * (process.poll() is None)
    except OSError:
      part = b""
    if not part:
      break
    text += part if ready else b""
  os.close(leader)
  return text.decode(), process.wait(timeout=60)


def test_the_bar_fits_a_terminal_of_80_columns(tiny, tmp_path):
  home = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], "TERM": "xterm", "COLUMNS": ""}
  script = tmp_path / "show.py"
  script.write_text(
    "import sys, time\n"
    "from jaxmoe.train.progress import Display\n"
    "display = Display(1200, 100, 3.4)\n"
    "display.start(0)\n"
    "clock = {'tokens_per_s': 14012.3, 'mfu': 0.12, 'seconds': {}}\n"
    "for step in range(1, 1201):\n"
    "  display.step({'step': step, 'loss': 4.47412, 'time': clock})\n"
    "  if step % 400 == 0: time.sleep(0.25)\n"
    "  if step == 800: display.say('evaluating step 800 ...')\n"
    "display.close()\n"
  )
  env = {**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}, **home}
  env |= {"PYTHONPATH": os.getcwd()}
  del env["COLUMNS"]
  text, code = seen_on_a_terminal([sys.executable, str(script)], env)
  assert code == 0, text
  plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
  lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
  last = lines[-1]
  for part in ("1200/1200", "loss 4.474", "bits/byte", "14,012 tok/s", "MFU 12%"):
    assert part in last, lines[-3:]
  assert max(map(len, lines)) <= 80, max(lines, key=len)
  assert "evaluating step 800 ..." in lines


def test_a_step_says_what_it_learned_or_why_it_did_not(capsys):
  clock = {"tokens_per_s": 1.0, "mfu": 0.0, "seconds": {}}
  lines = ({"loss": 1.0}, {"loss": None}, {"loss": None, "labels": 0, "unlabelled": 1})
  for bytes_per_token in (2.0, 0.0):
    display = progress.Display(num_steps=9, log_every=1, bytes_per_token=bytes_per_token)
    for step, line in enumerate(lines, 1):
      display.step({"step": step, "time": clock, **line})
  told = [line.split("  ")[1:-2] for line in capsys.readouterr().out.splitlines()]
  rest = [["loss not finite"], ["no labels"]]
  assert told == [["loss 1.000", "0.721 bits/byte"], *rest, ["loss 1.000"], *rest]


def test_a_long_phase_says_what_it_is_at_every_interval(monkeypatch, capsys):
  monkeypatch.setattr(console_progress, "SILENCE_S", 0.01)
  display = progress.Display(num_steps=10, log_every=5, bytes_per_token=1.0)
  with display.phase("compiling train_step"):
    deadline = time.monotonic() + 30
    out = ""
    while out.count("compiling train_step ... ") < 3 and time.monotonic() < deadline:
      out += capsys.readouterr().out
  assert out.startswith("compiling train_step ...\n")
  assert out.count("compiling train_step ... 0 s\n") >= 3


def test_a_step_that_comes_after_a_long_silence_is_told_out_of_turn(monkeypatch, capsys):
  display = progress.Display(num_steps=100, log_every=50, bytes_per_token=1.0)
  clock = {"tokens_per_s": 1.0, "mfu": 0.0, "seconds": {}}
  display.step({"step": 1, "loss": 1.0, "time": clock})
  assert capsys.readouterr().out == ""
  now = time.monotonic()
  monkeypatch.setattr(progress.time, "monotonic", lambda: now + 10.5)
  display.step({"step": 2, "loss": 1.0, "time": clock})
  assert capsys.readouterr().out.startswith("step 2/100  loss 1.000")
  display.step({"step": 3, "loss": 1.0, "time": clock})
  assert capsys.readouterr().out == ""
