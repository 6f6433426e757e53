"""Outputs are whole or not there, go through links, FIFOs and devices, and spare what is read."""

import ast
import errno
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_atomic, write_output

ROOT = pathlib.Path(__file__).parents[2]


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "eval.json"
  write_atomic(path, "old")

  def no_space(descriptor):
    raise OSError(errno.ENOSPC, "no space")

  monkeypatch.setattr(os, "fsync", no_space)
  with pytest.raises(OSError, match="no space"):
    write_atomic(path, "new and longer")
  with pytest.raises(InputError, match=r"cannot be written \(no space\); make room"):
    write_output(path, "--out=x", b"new")
  assert path.read_text() == "old" and names(tmp_path) == ["eval.json"]
  monkeypatch.undo()
  write_atomic(path, "new")
  assert path.read_text() == "new" and names(tmp_path) == ["eval.json"]


def test_what_fails_while_it_is_made_leaves_nothing(tmp_path):
  def half(file):
    file.write(b"half")
    raise ZeroDivisionError

  for path in (tmp_path / "file", os.devnull):
    with pytest.raises(ZeroDivisionError):
      write_atomic(path, half)
  assert names(tmp_path) == []


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "file").symlink_to("there/old")
  (tmp_path / "there" / "old").write_text("old")
  (tmp_path / "dangling").symlink_to("there/new")
  for link in ("file", "dangling"):
    check_output(tmp_path / link, "--out")
    write_atomic(tmp_path / link, "text")
    assert (tmp_path / link).is_symlink() and (tmp_path / link).read_text() == "text"
  assert names(tmp_path / "there") == ["new", "old"]


def test_a_link_to_itself_is_refused(tmp_path):
  (tmp_path / "loop").symlink_to("loop")
  with pytest.raises(InputError, match=r"--out=loop: cannot be written \(Too many levels"):
    check_output(tmp_path / "loop", "--out=loop")
  with pytest.raises(OSError, match="Too many levels"):
    write_atomic(tmp_path / "loop", "text")
  assert (tmp_path / "loop").is_symlink()


def test_a_device_is_written_into_and_stays_a_device(tmp_path):
  (tmp_path / "link").symlink_to(os.devnull)
  for path in (tmp_path / "link", os.devnull):
    before = os.lstat(path)
    check_output(path, "--out", inputs=[os.devnull])
    write_atomic(path, lambda file: np.savez(file, a=np.arange(3)))
    assert os.path.samestat(before, os.lstat(path))


def test_a_fifo_carries_all_of_it_and_stays_a_fifo(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  # Its pages are ours until the end of this test, so nobody waits for anybody.
  reader = os.open(tmp_path / "fifo", os.O_RDWR)
  check_output(tmp_path / "fifo", "--out")
  write_atomic(tmp_path / "fifo", lambda file: np.savez(file, a=np.arange(3)))
  (tmp_path / "copy.npz").write_bytes(os.read(reader, 1 << 16))
  os.close(reader)
  np.testing.assert_array_equal(np.load(tmp_path / "copy.npz")["a"], np.arange(3))
  assert (tmp_path / "fifo").is_fifo() and names(tmp_path) == ["copy.npz", "fifo"]


def test_standard_output_gets_it_between_what_is_printed(tmp_path):
  code = (
    "from jaxmoe.core.output import check_output, write_atomic\n"
    "print('before', end=' ')\n"
    "check_output('/dev/stdout', '--out')\n"
    "write_atomic('/dev/stdout', 'written')\n"
    "print(' after')"
  )
  with open(tmp_path / "out", "wb") as file:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=file, timeout=60)
  assert done.returncode == 0
  assert (tmp_path / "out").read_text() == "before written after\n"


def test_an_output_that_is_read_is_refused_by_any_of_its_names(tmp_path):
  ids = tmp_path / "ids.npy"
  ids.write_text("ids")
  (tmp_path / "link").symlink_to("ids.npy")
  (tmp_path / "twin").hardlink_to(ids)
  (tmp_path / "run").mkdir()
  for path in (ids, tmp_path / "link", tmp_path / "twin", tmp_path / "run" / ".." / "ids.npy"):
    with pytest.raises(InputError, match=r"would be written over .*ids\.npy, which is read"):
      check_output(path, "--out=x", [tmp_path / "other", ids])
  with pytest.raises(InputError, match=r"would be written over .*run, which is read"):
    check_output(tmp_path / "run" / "new", "--out=x", [tmp_path / "run"])
  check_output(tmp_path / "runs", "--out=x", [tmp_path / "run", ids])
  assert ids.read_text() == "ids"
  assert names(tmp_path) == ["ids.npy", "link", "run", "twin"] and not names(tmp_path / "run")


@pytest.mark.parametrize(
  ("path", "why"),
  [
    (".", "is a folder"), ("no/x", "no is no folder"), ("file/x", "file is no folder"),
    ("a" * 300, "name too long"), ("/proc/x", "cannot be written"),
  ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path, path, why):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match=f"--out=x: .*{why}"):
    check_output(tmp_path / path, "--out=x")
  assert names(tmp_path) == ["file"]


WRITERS = {
  "jaxmoe/core/output.py": "the piece itself",
  "jaxmoe/checkpoint/directory_store.py": "WHY.txt in a folder of its own",
  "jaxmoe/checkpoint/npz_store.py": "a folder that is renamed when it is whole",
  "jaxmoe/checkpoint/streaming_writer.py": "a folder that is renamed when it is whole",
  "jaxmoe/data/tokenizers/byte.py": "a folder that is renamed, or a temporary one",
  "jaxmoe/data/tokenizers/subword.py": "the same",
  "jaxmoe/data/worker.py": "a pipe",
  "jaxmoe/models/pretrained/dtypes.py": "a folder that is renamed when it is whole",
  "jaxmoe/models/pretrained/safetensors_writer.py": "the same",
  "jaxmoe/train/append_file.py": "files of a run that only grow",
  "jaxmoe/train/run_log.py": "files of a run that are cut",
  "jaxmoe/train/routing_record.py": "an open file",
  "jaxmoe/train/watchdog.py": "stacks of a run that hangs",
  "jaxmoe/train/workdir.py": "the lock",
  "jaxmoe/bench/sides/own.py": "a temporary folder of one race",
  "jaxmoe/bench/sides/protocol.py": "a pipe",
  "jaxmoe/bench/rival_operations.py": "a temporary folder of one race",
  "jaxmoe/bench/sides/tokamax.py": "a temporary folder of one race",
  "jaxmoe/bench/sides/torch.py": "a temporary folder of one race",
  "jaxmoe/commands/start_probe.py": "a temporary folder of one race",
  "jaxmoe/conversion/hf_files.py": "a folder that is renamed when it is whole",
  "jaxmoe/commands/process/command_line.py": "standard output of a process that has none",
  "jaxmoe/conversion/hf_export.py": "the same as hf_files.py",
  "jaxmoe/commands/score.py": "an open file",
  "jaxmoe/sinks/wandb.py": "a file of a run, made once",
}
"""Who else writes files, and why that needs no `write_atomic`."""


def writes(node):
  """Whether a call writes a file: by its name, or by a mode."""
  name = getattr(node.func, "attr", getattr(node.func, "id", ""))
  if name in ("write_text", "write_bytes", "savez", "savez_compressed", "save_file", "copyfile"):
    return True
  modes = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
  texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
  return name in ("open", "fdopen") and any(set(str(text)) & set("wax+") for text in texts)


def test_every_writer_of_the_package_uses_the_shared_piece_or_is_known():
  found = set()
  for path in [*ROOT.glob("jaxmoe/**/*.py"), *ROOT.glob("launch/**/*.py")]:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    if any(map(writes, calls)):
      found.add(str(path.relative_to(ROOT)))
  assert found == set(WRITERS)
