"""Start and end of one of several processes: distributed JAX, and one line for all of them.

`jaxmoe local` tells its processes by environment variables who they are; they serve by hand, too:
JAX_COORDINATOR_ADDRESS=HOST:PORT, JAXMOE_PROCESSES=N, JAXMOE_PROCESS=0..N-1. On a TPU pod (GKE's
too), under SLURM and under Open MPI JAX finds out by itself. JAXMOE_HEARTBEAT_S: after how many
seconds without a sign of life a process counts as dead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax._src import distributed  # no public way to meet without the devices

from jaxmoe.commands.process.command_line import (
  ADDRESS,
  HEARTBEAT_S,
  INTERRUPTED,
  PROCESS,
  PROCESSES,
  as_started,
)
from jaxmoe.commands.process.patient_output import patient
from jaxmoe.core import multihost
from jaxmoe.core.errors import InputError, PeerError, UserFacingError, machine_error
from jaxmoe.train.console_progress import ConsoleProgress

DEFAULT_HEARTBEAT_S = 60
_LAST_WORDS_S = 5.0
"""How long the processes wait for each other to say why all of them end."""


@contextlib.contextmanager
def processes() -> Iterator[None]:
  """Makes this process one of those of a run, if the environment says that there are several.

  Only process 0 prints on standard output. An error that all have is printed by process 0 alone;
  one that only this process has, by this one, and the others die of its absence. Nothing of that
  waits for a process that is not there any more.

  Raises:
    InputError: the environment is not complete, or the processes did not find each other.
  """
  _start()
  if not multihost.is_multi_process():
    yield
    return
  _take_standard_output()
  try:
    yield
  except BaseException as error:
    _end(multihost.peer_error(error) or machine_error(error) or error)


def _start() -> None:
  for name in ("absl", "jax"):
    logging.getLogger(name).setLevel(logging.ERROR)
  heartbeat_s = _number(HEARTBEAT_S, DEFAULT_HEARTBEAT_S)
  jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
  try:
    if PROCESSES in os.environ:
      count, index = _number(PROCESSES, 1), _number(PROCESS, -1)
      if count < 2:
        return
      address = os.environ.get(ADDRESS, "")
      if index == 0:
        _check_port(address)
      with _say_who_is_waited_for(f"the {count} processes of the run to meet at {address}"):
        jax.distributed.initialize(
          address, count, index, heartbeat_timeout_seconds=heartbeat_s,
          cluster_detection_method="deactivate",
        )  # fmt: skip
    elif is_one_of_several():
      with _say_who_is_waited_for("the other processes of the run"):
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_s)
  except InputError:
    raise
  except (ValueError, RuntimeError) as error:
    text = " ".join(str(error).split())
    raise InputError(
      f"the processes of this run did not find each other ({text[:300]}); look at {ADDRESS}, "
      f"{PROCESSES} and {PROCESS}, or at what the cluster sets"
    ) from None


def _say_who_is_waited_for(who: str) -> contextlib.AbstractContextManager[None]:
  """Says, now and then, who is waited for: they may never come, and JAX waits for minutes."""
  return ConsoleProgress().phase(f"waiting for {who}", brief=True)


def _check_port(address: str) -> None:
  """Returns if process 0 can be met at an address, where there are no others to be met by mistake.

  JAX ends without a word where it cannot listen, and shares a port with another coordinator.

  Raises:
    InputError: another program has the port.
  """
  port = address.rpartition(":")[2]
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  if not port.isdecimal():
    return  # JAX says what is wrong with it
  with socket.socket(family) as tried:
    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      if family == socket.AF_INET6:
        tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
      tried.bind(("", int(port)))
    except (OSError, OverflowError) as error:
      raise InputError(
        f"{ADDRESS}={address}: process 0 cannot listen there ({error}); give another port "
        "(jaxmoe local, started again, takes another by itself)"
      ) from None


def _take_standard_output() -> None:
  """Leaves standard output to Python's part of process 0; gloo writes there, too."""
  if multihost.is_main_process():
    sys.stdout.flush()
    sys.stdout = patient(os.dup(1))
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_one_of_several() -> bool:
  """Whether the environment is one in which `jax.distributed` finds out by itself.

  A shell within an allocation is not: nobody would start the other processes.
  """
  env = os.environ
  if "SLURM_STEP_NODELIST" in env and _number("SLURM_NTASKS", 1) > 1:
    return True
  if "OMPI_MCA_orte_hnp_uri" in env and _number("OMPI_COMM_WORLD_SIZE", 1) > 1:
    return True
  if "," in env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", "")):
    return True
  chips = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
  asks = (env.get("JAX_PLATFORMS") or "tpu").startswith("tpu") and "TPU_SKIP_MDS_QUERY" not in env
  return chips and asks and _has_libtpu()


def _has_libtpu() -> bool:
  with contextlib.suppress(ImportError):
    import libtpu  # noqa: F401

    return True
  return False


def _number(name: str, default: int) -> int:
  text = os.environ.get(name, str(default))
  try:
    return int(text)
  except ValueError:
    raise InputError(f"{name}={text}: expected a whole number") from None


def _end(error: BaseException) -> NoReturn:
  """Says why, once, and ends without waiting for what may not come any more."""
  code, line = _code_and_line(error)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  if isinstance(error, PeerError):
    _say(line)
    os._exit(code)
  all_end = _all_end(code)
  if line and (multihost.is_main_process() or not all_end):
    _say(line)
  elif not line and code == 1:
    traceback.print_exception(error)
    sys.stderr.flush()
  if all_end:
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()
  os._exit(code)


def _code_and_line(error: BaseException) -> tuple[int, str]:
  if isinstance(error, UserFacingError | PeerError):
    return error.code, str(error)
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED, "interrupted; what was saved stays"
  if isinstance(error, SystemExit):
    return (error.code if isinstance(error.code, int) else int(error.code is not None)), ""
  return 1, ""


def _all_end(code: int) -> bool:
  """Whether all processes have come here, for the same reason."""
  client = distributed.global_state.client
  assert client is not None
  try:
    client.wait_at_barrier(f"jaxmoe ends with {code}", int(_LAST_WORDS_S * 1000))
  except Exception:
    return False
  return True


def _say(line: str) -> None:
  print(f"error: {as_started(' '.join(line.split()))}", file=sys.stderr, flush=True)
