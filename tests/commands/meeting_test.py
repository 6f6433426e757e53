"""How the processes of a run find each other, and what is said when they do not."""

import socket
import time

import jax
import pytest

from jaxmoe.commands import local
from jaxmoe.commands.process import multi_process
from jaxmoe.core.errors import InputError
from jaxmoe.train import console_progress


@pytest.fixture
def taken():
  """Returns an address where another program listens."""
  with socket.create_server(("127.0.0.1", 0)) as other:
    yield f"127.0.0.1:{other.getsockname()[1]}"


@pytest.fixture
def meet(monkeypatch):
  """Returns a function (address, process, initialize) that starts one of two processes."""

  def run(address, process, initialize):
    values = {"JAX_COORDINATOR_ADDRESS": address, "JAXMOE_PROCESSES": "2"}
    for name, value in {**values, "JAXMOE_PROCESS": str(process)}.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    multi_process._start()

  return run


def never(*arguments, **options):
  raise AssertionError("it would have ended without a word")


def test_a_port_that_is_taken_ends_process_0_with_one_line(meet, taken):
  with pytest.raises(InputError, match=f"{taken}: process 0 cannot listen there"):
    meet(taken, 0, never)


def test_a_port_that_is_free_or_another_s_is_none_of_our_business(meet, taken):
  met = []
  with socket.create_server(("127.0.0.1", 0)) as other:
    free = f"127.0.0.1:{other.getsockname()[1]}"
  for address, process in ((free, 0), (taken, 1)):
    meet(address, process, lambda address, *arguments, **options: met.append(address))
  assert met == [free, taken]


def test_who_waits_for_the_others_says_so(meet, monkeypatch, capsys):
  monkeypatch.setattr(console_progress, "SILENCE_S", 0.01)
  shown = []

  def wait(*arguments, **options):
    deadline = time.monotonic() + 30
    while "host:1 ..." not in "".join(shown) and time.monotonic() < deadline:
      shown.append(capsys.readouterr().out)

  meet("host:1", 1, wait)
  assert "waiting for the 2 processes of the run to meet at host:1 ... 0 s\n" in "".join(shown)


def test_the_others_of_one_that_refuses_its_input_do_not_live_for_a_heartbeat(monkeypatch):
  monkeypatch.setattr(local.ProcessGroup, "__init__", lambda self: None)
  crew = local.ProcessGroup()
  crew._grace_s = 600
  assert crew._left_s(InputError.code) == 10
  assert crew._left_s(1) == 600
