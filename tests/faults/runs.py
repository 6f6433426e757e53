"""Runs as the tests see them: started, sent signals, waited for, and what they leave behind."""

import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LONG_S = 240.0  # no run of this suite lives longer


@dataclasses.dataclass(frozen=True)
class Ended:
  """What a process left: its exit code, or minus the signal that ended it, and its output."""

  code: int
  out: str
  err: str


class Zygote:
  """The fork server of zygote.py, and the way to talk to it."""

  def __init__(self, home: pathlib.Path, compiled: pathlib.Path):
    own = {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # A pool of OpenBLAS threads would make forking unsound; the runs' products are XLA's.
    own["OPENBLAS_NUM_THREADS"] = "1"
    (home / "jaxmoe").mkdir(parents=True, exist_ok=True)
    compiled.mkdir(parents=True, exist_ok=True)  # nobody may have compiled anything here yet
    if not (home / "jaxmoe" / "compiled").exists():
      (home / "jaxmoe" / "compiled").symlink_to(compiled)
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.faults.zygote"], cwd=ROOT, env={**os.environ, **own},
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    assert self._answer(LONG_S) == {"alone": True}, "forking is not sound here"

  def start(self, folder, arguments, plants=(), env=None):
    """Returns a run of `launch.train` forked off; its output goes to files in `folder`."""
    count = len(list(folder.glob("*.out")))
    out, err = folder / f"{count}.out", folder / f"{count}.err"
    run = {"arguments": list(map(str, arguments)), "plants": list(plants), "env": env or {}}
    answer = self._ask(start={**run, "out": str(out), "err": str(err)})
    assert "pid" in answer, answer
    return Run(self, answer["pid"], out, err)

  def wait(self, pid, timeout_s):
    """Returns the wait status of a run; kills it first if it takes too long."""
    self._send(wait=pid)
    answer = self._answer(timeout_s)
    if answer is None:
      os.killpg(pid, signal.SIGKILL)
      answer = {**self._answer(LONG_S), "late": True}
    return answer

  def close(self):
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def _ask(self, **request):
    self._send(**request)
    return self._answer(LONG_S)

  def _send(self, **request):
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()

  def _answer(self, timeout_s):
    if not select.select([self._process.stdout], [], [], timeout_s)[0]:
      return None
    return json.loads(self._process.stdout.readline())


class Run:
  """A process that lives until it is waited for."""

  def __init__(self, zygote, pid, out, err):
    self._zygote, self.pid, self._out, self._err = zygote, pid, out, err

  def send(self, number):
    os.kill(self.pid, number)

  def wait(self, timeout_s=LONG_S):
    answer = self._zygote.wait(self.pid, timeout_s)
    ended = Ended(
      os.waitstatus_to_exitcode(answer["status"]), self._out.read_text(), self._err.read_text()
    )
    assert "late" not in answer, f"did not end within {timeout_s} s: {ended}"
    return ended


def events(workdir, kind=None, torn=False):
  """Returns the events of a run, or those of one kind; unless `torn` every line must be one."""
  found = []
  for line in (workdir / "events.jsonl").read_bytes().split(b"\n")[:-1]:
    try:
      found.append(json.loads(line))
    except ValueError:
      assert torn, line
  return [event for event in found if event and kind in (None, event["event"])]


def steps_saved(workdir):
  names = [path.name for path in (workdir / "checkpoints").glob("*")]
  return sorted(int(name) for name in names if name.isdecimal())


def metrics(workdir):
  """Returns the lines of a run without what depends on the clock."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    assert line.pop("time")
  return [json.dumps(line) for line in lines]


def left_behind(workdir, torn=False):
  """Returns what must not depend on the clock or on what happened on the way."""
  done = events(workdir, "done", torn)[-1]
  half_done = [path.name for path in (workdir / "checkpoints").glob("*tmp*")]
  samples = workdir / "samples.md"
  return {
    "metrics": metrics(workdir),
    "digest": done["digest"],
    "domains": done["data"]["domains"],
    "samples": samples.read_text() if samples.exists() else None,
    "config": (workdir / "config.json").read_text(),
    "saved": (steps_saved(workdir)[-1], half_done),
  }
