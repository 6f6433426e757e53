"""Machines as facts: a good one, and for every condition one that has it."""

import dataclasses

from jaxmoe.cost.host import HostMemory
from jaxmoe.doctor.diagnosis import GB, MB
from jaxmoe.doctor.facts import Disk, Facts, Requirement, Trial

RUN = {"losses": [6.0, 5.5, 5.0], "equal": True, "seconds": 9.0}
TOLD = {
  "devices": [{"platform": "cpu", "kind": "cpu", "memory_bytes": None}],
  "run": RUN,
  "peak_flops_per_s": {"float32": 1e11},
}
GOOD = Facts(
  python=("3.11.7", ">=3.11,<3.13"),
  requirements=(
    Requirement("jax", "<0.12,>=0.10.2", "0.10.2"),
    Requirement("numpy", ">=2.0", "2.4.6"),
    Requirement("wandb", ">=0.31", "0.31.0", "wandb"),
    Requirement("pyarrow", "", None, "data"),
    Requirement("jax", "<0.12,>=0.10.2", "0.10.2", "cuda"),
  ),
  plugins={"jaxlib": "0.10.2"},
  accelerators=(),
  cores=8,
  load=0.5,
  memory=HostMemory(24 * GB, 16 * GB),
  workdir=Disk("runs", 100 * GB, 500.0 * MB, 0.01, 0.0),
  cache=Disk("/cache", 100 * GB, 500.0 * MB, 0.01, 0.0),
  open_files=4096,
  shm_bytes=8 * GB,
  unix_s=1.8e9,
  trial=Trial(TOLD, 0),
)


def with_(**fields):
  """Returns the good machine but for some facts."""
  return dataclasses.replace(GOOD, **fields)


def trial(code=0, errors="", **results):
  """Returns the good machine with another trial."""
  return with_(trial=Trial({**TOLD, **results}, code, errors))


def workdir(**fields):
  """Returns the good machine with another disk for runs."""
  return with_(workdir=dataclasses.replace(GOOD.workdir, **fields))


def cache(**fields):
  """Returns the good machine with another disk for caches."""
  return with_(cache=dataclasses.replace(GOOD.cache, **fields))


def wants(*requirements):
  """Returns the good machine with more packages asked for."""
  return with_(requirements=(*GOOD.requirements, *requirements))


def device(platform, **fields):
  """Returns one device as a trial tells of it."""
  return [{"platform": platform, "kind": "X", "memory_bytes": 80 * GB, **fields}]


JUDGED = {
  "wrong python": (with_(python=("3.13.0", ">=3.11,<3.13")), "problem", "python", "3.13.0, needs"),
  "not installed": (with_(python=("3.11.7", "")), "problem", "python", "not installed in it"),
  "package missing": (
    wants(Requirement("optax", ">=0.2.8", None)), "problem", "packages", "optax is missing"
  ),
  "package too old": (
    wants(Requirement("optax", ">=0.2.8", "0.2.7")), "problem", "packages", "optax 0.2.7, needs"
  ),
  "jax too new": (
    with_(requirements=(Requirement("jax", "<0.12,>=0.10.2", "0.12.0"),), plugins={}),
    "problem", "packages", "jax 0.12.0, needs <0.12",
  ),
  "jaxlib of another jax": (
    with_(plugins={"jaxlib": "0.11.0"}), "problem", "packages", "jaxlib 0.11.0 does not fit"
  ),
  "plugin of another jax": (
    with_(plugins={"jax-cuda13-plugin": "0.9.0"}), "problem", "packages", "does not fit jax 0.10.2"
  ),
  "extra too old": (
    wants(Requirement("torch", ">=2.6", "2.5", "hf")), "warning", "extras", "torch 2.5, needs"
  ),
  "no device": (
    trial(1, "x\nRuntimeError: no backend", devices=None), "problem", "devices", "no device"
  ),
  "unused gpu": (
    with_(accelerators=(("an NVIDIA GPU", "cuda"),)), "warning", "devices", "an NVIDIA GPU, unused"
  ),
  "busy": (with_(load=20.0), "warning", "cores", "20.0 wanted"),
  "one core": (with_(cores=1), "warning", "cores", "1 for this process"),
  "half a core": (with_(cores=0.5), "warning", "cores", "0.5 for this process"),
  "no memory": (with_(memory=HostMemory(4 * GB, GB // 2)), "problem", "memory", "0.5 GB of 4.0 GB"),
  "little memory": (
    with_(memory=HostMemory(8 * GB, 2 * GB)), "warning", "memory", "2.0 GB of 8.0 GB"
  ),
  "a small group": (
    with_(memory=HostMemory(600 * MB, 500 * MB, grouped=True)), "problem", "memory",
    "0.5 GB of 0.6 GB free (the limit of this control group)",
  ),
  "full disk": (
    workdir(free_bytes=100 * MB, error="too little"), "problem", "workdir", "0.1 GB free"
  ),
  "nearly full disk": (workdir(free_bytes=2 * GB), "warning", "workdir", "2.0 GB free"),
  "read-only disk": (
    workdir(error="Read-only file system", write_bytes_per_s=0.0),
    "problem", "workdir", "cannot write at runs: Read-only",
  ),
  "slow disk": (workdir(write_bytes_per_s=5.0 * MB), "warning", "writing", "5 MB/s"),
  "slow sync": (workdir(fsync_s=0.9), "warning", "writing", "900.0 ms"),
  "clock of the disk ahead": (workdir(clock_ahead_s=7.0), "warning", "clock", "+7.0 s off"),
  "clock of the disk behind": (workdir(clock_ahead_s=-7.0), "warning", "clock", "-7.0 s off"),
  "clock in the past": (with_(unix_s=1e9), "problem", "clock", "before this code"),
  "unwritable cache": (cache(error="Permission denied"), "warning", "cache", "Permission denied"),
  "full cache": (cache(free_bytes=10 * MB), "warning", "cache", "10 MB free"),
  "few files": (with_(open_files=256), "warning", "open files", "256 at once"),
  "little shm": (with_(shm_bytes=64 * MB), "warning", "shared", "64 MB free"),
  "slow matmul": (trial(peak_flops_per_s={"float32": 1e9}), "warning", "matmul", "1 GFLOP/s"),
  "crash": (trial(-11, "Segmentation fault", run=None), "problem", "training", "signal 11"),
  "no end": (
    trial(-1, "it did not end within 300 s", run=None), "problem", "training", "did not end"
  ),
  "exit": (trial(1, "Trace\nValueError: x", run=None), "problem", "training", "ValueError: x"),
  "not finite": (trial(run={**RUN, "losses": [6.0, None, 5.0]}), "problem", "training", "nan"),
  "too few steps": (trial(run={**RUN, "losses": [6.0]}), "problem", "training", "[6.0]"),
  "damaged checkpoint": (trial(run={**RUN, "equal": False}), "problem", "training", "other values"),
  "late failure": (trial(1, "RuntimeError: y"), "warning", "training", "then: RuntimeError: y"),
}  # fmt: skip
