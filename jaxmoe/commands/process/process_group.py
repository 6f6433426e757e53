"""Processes of this machine that do one thing together, and live and die together."""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence

from jaxmoe.commands.process.command_line import (
  ADDRESS,
  HEARTBEAT_S,
  INTERRUPTED,
  PREEMPTED,
  PROCESS,
  PROCESSES,
  STARTED_AS,
  from_clone,
  stops,
)
from jaxmoe.core.errors import InputError, PeerError

_GRACE_S = 5
_TICK_S = 0.05
_MILDER = (2, 4, 3, INTERRUPTED, PeerError.code, PREEMPTED, 0)
"""Exit codes from bad to good; any other is worse than all of them."""


class ProcessGroup:
  """Processes that live and die together."""

  def __init__(self, program: Sequence[str], processes: int, devices: int, heartbeat_s: int):
    self._grace_s = heartbeat_s + _GRACE_S
    self._sent: set[int] = set()
    self._killed = False
    self._readers: list[threading.Thread] = []
    self._members: list[subprocess.Popen[bytes]] = []
    for number in stops():
      signal.signal(number, self._pass_on)
    env = environment(processes, devices, heartbeat_s)
    try:
      for index in range(processes):
        self._members.append(_start(program, {**env, PROCESS: str(index)}, quiet=index > 0))
    except OSError:
      self._kill()
      raise
    for index, member in enumerate(self._members[1:], start=1):
      thread = threading.Thread(target=_relay, args=(index, member), daemon=True)
      thread.start()
      self._readers.append(thread)

  def wait(self) -> int:
    """Returns the worst exit code, once all have ended."""
    deadline, ended = math.inf, set[int]()
    while len(ended) < len(self._members):
      time.sleep(_TICK_S)
      for index, member in enumerate(self._members):
        code = member.poll()
        if code is None or index in ended:
          continue
        ended.add(index)
        deadline = min(deadline, time.monotonic() + self._left_s(code))
        self._report(index, -code)
      if time.monotonic() > deadline and not self._killed:
        self._kill()
    self._kill()  # what a process left behind
    for thread in self._readers:
      thread.join(_GRACE_S)
    return worst([self._exit_code(member.returncode) for member in self._members])

  def _exit_code(self, code: int) -> int:
    if code >= 0:
      return code
    if -code in self._sent:  # it had not begun to listen
      return INTERRUPTED if -code == signal.SIGINT else PREEMPTED
    return PeerError.code

  def _left_s(self, code: int) -> float:
    """Returns how long the others may live on after one ended."""
    if code in (PeerError.code, -signal.SIGABRT):  # who noticed that another one is dead
      return _GRACE_S
    if code == InputError.code:  # it is alike for all, and the others may be waiting for this one
      return 2 * _GRACE_S
    return self._grace_s if code else math.inf

  def _report(self, index: int, number: int) -> None:
    if number <= 0 or number in self._sent or self._killed:
      return
    name = signal.Signals(number).name
    print(
      f"error: process {index} was ended by {name}; the same command goes on from the last "
      "checkpoint",
      file=sys.stderr, flush=True,
    )  # fmt: skip

  def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
    self._sent.add(number)
    for member in self._members:
      if member.poll() is None:
        member.send_signal(number)

  def _kill(self) -> None:
    """Ends each process and whatever it started."""
    self._killed = True
    for member in self._members:
      try:
        os.killpg(member.pid, signal.SIGKILL)
      except (ProcessLookupError, PermissionError):
        continue


def environment(processes: int, devices: int, heartbeat_s: int) -> dict[str, str]:
  """Returns the environment of the processes; PROCESS is still missing."""
  env = {name: value for name, value in os.environ.items() if name != PROCESSES}
  other = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.pop("XLA_FLAGS", ""))
  if other.strip():
    env["XLA_FLAGS"] = other.strip()
  env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    env[ADDRESS] = f"127.0.0.1:{free.getsockname()[1]}"
  if from_clone():
    env[STARTED_AS] = "1"
  return env | {PROCESSES: str(processes), HEARTBEAT_S: str(heartbeat_s)}


def worst(codes: Sequence[int]) -> int:
  """Returns the exit code that says most about why they ended."""
  unknown = [code for code in codes if code not in _MILDER]
  return unknown[0] if unknown else next(code for code in _MILDER if code in codes)


def _start(program: Sequence[str], env: dict[str, str], quiet: bool) -> subprocess.Popen[bytes]:
  """Returns a process in a session of its own, so that a terminal interrupts it only through us."""
  pipe = subprocess.PIPE if quiet else None
  return subprocess.Popen(
    program, env=env, stdin=subprocess.DEVNULL, stdout=pipe,
    stderr=subprocess.STDOUT if quiet else None, start_new_session=True, preexec_fn=_die_with_us,
  )  # fmt: skip


def _die_with_us() -> None:
  """Asks Linux to kill this process when its parent dies, however it does."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _relay(index: int, member: subprocess.Popen[bytes]) -> None:
  assert member.stdout is not None
  for line in member.stdout:
    sys.stderr.buffer.write(b"[%d] " % index + line)
    sys.stderr.flush()
