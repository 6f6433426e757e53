"""What commands write where a user says: never over what they read, and through links."""

import errno
import os
import resource
import shutil

import numpy as np
import pytest

from jaxmoe.commands.process import run_flags


@pytest.fixture
def ids(tmp_path):
  """Returns an .npy of ids that may be scored."""
  np.save(tmp_path / "ids.npy", np.arange(8, dtype=np.int32).reshape(1, 8))
  return tmp_path / "ids.npy"


REFUSED = {
  "scores over ids": ("score", "--ids=IDS", "--out=IDS"),
  "scores over ids by a link": ("score", "--ids=IDS", "--out=LINK"),
  "scores over choices": ("score", "--ids=IDS", "--out=ROUTING", "--replay_routing=ROUTING"),
  "scores over a run": ("score", "--ids=IDS", "--out=RUN/config.json"),
  "scores in a checkpoint": ("score", "--ids=IDS", "--out=RUN/checkpoints/6/scores.npz"),
  "choices over ids": ("score", "--ids=IDS", "--out=OUT", "--record_routing=IDS"),
  "scores over texts": ("evaluate", "--text=RUN/text.txt"),
  "answers over questions": ("evaluate", "--choices=RUN/eval_choices.json"),
  "a page over metrics": ("report", "--out=RUN/metrics.jsonl"),
  "a plan over its recipe": ("explain", "--config=RUN/config.json", "--json=RUN/config.json"),
  "an oracle over a run": ("oracle", "--out=ORACLE"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_output_that_is_read_is_refused_and_stays(here, trained, ids, tmp_path, what):
  run = tmp_path / "run"
  run.mkdir()
  for path in trained.iterdir():  # by links, which cost nothing
    (run / path.name).symlink_to(path)
  question = '{"question": "a", "choices": ["b", "c"], "answer": 0}\n'
  for name in ("text.txt", "eval_choices.json", "routing.npz"):
    (run / name).write_text(question)
  (run / "eval_text.json").symlink_to("text.txt")
  (tmp_path / "link").symlink_to(ids)
  (tmp_path / "oracle").mkdir()
  (tmp_path / "oracle" / "oracle.md").symlink_to(run / "samples.md")
  places = {
    "IDS": ids, "LINK": tmp_path / "link", "RUN": run, "ROUTING": run / "routing.npz",
    "OUT": tmp_path / "out.npz", "ORACLE": tmp_path / "oracle",
  }  # fmt: skip
  name, *words = REFUSED[what]
  for word, place in places.items():
    words = [flag.replace(word, str(place)) for flag in words]
  before = {path: path.read_bytes() for path in [*trained.rglob("*"), ids] if path.is_file()}
  workdir = () if name == "explain" else (f"--workdir={run}",)
  result = here(name, *workdir, *words)
  assert result.code == 2, result
  assert len(result.err.splitlines()) == 1 and "would be written over" in result.err, result.err
  assert {path: path.read_bytes() for path in before} == before


WRITTEN = {
  "score": ("--ids=IDS", "--out=NULL", "--record_routing=ZERO"),
  "report": ("--out=NULL",),
  "explain": ("--nocompile", "--json=NULL"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_output_that_is_a_device_by_a_link_is_written_into(
  here, trained, tiny, ids, tmp_path, name
):
  (tmp_path / "null").symlink_to(os.devnull)
  (tmp_path / "zero").symlink_to("/dev/zero")  # takes what it is given, too
  before = os.lstat(os.devnull)
  places = {"IDS": ids, "NULL": tmp_path / "null", "ZERO": tmp_path / "zero"}
  words = list(WRITTEN[name])
  for word, place in places.items():
    words = [flag.replace(f"={word}", f"={place}") for flag in words]
  result = here(name, tiny if name == "explain" else f"--workdir={trained}", *words)
  assert result.code == 0, result
  assert os.path.samestat(os.lstat(os.devnull), before)
  assert (tmp_path / "null").is_symlink() and (tmp_path / "zero").is_symlink()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "null", "zero"]


@pytest.mark.parametrize("name", ["evaluate", "score", "report"])
def test_a_disk_that_refuses_the_last_bytes_is_one_line_and_leaves_nothing(
  here, trained, ids, tmp_path, monkeypatch, name
):
  run = shutil.copytree(trained, tmp_path / "run")
  flags = (f"--ids={ids}", f"--out={tmp_path}/scores.npz") if name == "score" else ()

  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  before = sorted(tmp_path.rglob("*"))
  result = here(name, f"--workdir={run}", *flags)
  assert result.code == 2, result
  assert len(result.err.splitlines()) == 1 and "No space left on device" in result.err
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["evaluate", "score", "report", "train", "surgery"])
def test_a_disk_that_is_full_is_told_before_anything_is_computed(
  here, compiles, trained, ids, again, tmp_path, name
):
  run = shutil.copytree(trained, tmp_path / "run")
  flags = {
    "score": (f"--ids={ids}", f"--out={run}/scores.npz"), "train": again,
    "surgery": ("--clone=2", f"--out={tmp_path}/new"),
  }.get(name, ())  # fmt: skip
  before, lowered = sorted(tmp_path.rglob("*")), len(compiles)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # empty files can be made
  try:
    result = here(name, f"--workdir={tmp_path / 'new' if name == 'train' else run}", *flags)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert result.code == 2, result
  assert len(result.err.splitlines()) == 1 and "File too large" in result.err
  assert sorted(tmp_path.rglob("*")) == before and compiles[lowered:] == []


def test_an_error_of_the_system_that_nobody_foresaw_is_one_line(here, monkeypatch):
  def stale(path):
    raise OSError(errno.ESTALE, "Stale file handle", "/mnt/x")

  monkeypatch.setattr(run_flags, "need_workdir", stale)
  result = here("generate", "--workdir=x", "--prompt=a")
  assert result.code == 2
  assert result.err.startswith("error: /mnt/x: Stale file handle; ")
  assert len(result.err.splitlines()) == 1
