"""Memory and cores are what the machine and the control groups say, whichever is less."""

import os

import pytest

from jaxmoe.cost import host

MB = 1 << 20
V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
  "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
  "32 31 0:29 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
  "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
  "34 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.fixture
def root(tmp_path):
  """Returns a function that writes a tree of /proc and /sys for a machine with 22 of 24 GB free."""

  def make(own, mounts, groups):
    meminfo = f"MemTotal: {24_000 * 1024} kB\nMemFree: 9 kB\nMemAvailable:   {22_000 * 1024} kB\n"
    files = {"proc/meminfo": meminfo, "proc/self/cgroup": own, "proc/self/mountinfo": mounts}
    for folder, of in groups.items():
      files |= {f"sys/fs/cgroup/{folder}/{name}": f"{text}\n" for name, text in of.items()}
    for name, text in files.items():
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_text(text)
    return tmp_path

  return make


def two(most, used, cache=0, **more):
  """The files of a group of version 2."""
  stat = f"anon 5\nfile {cache}\ninactive_file {cache}\nactive_file 0"
  return {"memory.max": most, "memory.current": used, "memory.stat": stat, **more}


def one(most, used, cache=0):
  """The files of a group of version 1; `inactive_file` there leaves out the groups below it."""
  stat = f"cache 7\ninactive_file 0\ntotal_inactive_file {cache}"
  return {"memory.limit_in_bytes": most, "memory.usage_in_bytes": used, "memory.stat": stat}


FULL = 9223372036854771712  # what version 1 says where there is no limit
SMALL = (600 * MB, 450 * MB, 50 * MB)
CASES = {
  "no groups": ("", "", {}, 24_000, 22_000),
  "2, a container's own": ("0::/\n", V2, {"": two(*SMALL)}, 600, 200),
  "2, no limit": ("0::/a\n", V2, {"a": two("max", 5 * MB)}, 24_000, 22_000),
  "2, above the machine": ("0::/a\n", V2, {"a": two(90_000 * MB, MB)}, 24_000, 22_000),
  "2, in a group around it": (
    "0::/a/b/c\n", V2, {"a": two(*SMALL), "a/b": two(2000 * MB, 0), "a/b/c": two("max", 0)},
    600, 200,
  ),
  "2, throttled before": ("0::/a\n", V2, {"a": two("max", 0, **{"memory.high": MB})}, 1, 1),
  "2, over its limit": ("0::/a\n", V2, {"a": two(100 * MB, 120 * MB)}, 100, 0),
  "2, outside of what is mounted": ("0::/../x\n", V2, {"": two(*SMALL)}, 600, 200),
  "2, another group's is no matter": (
    "0::/a\n", V2, {"a": two("max", 0), "b": two(*SMALL)}, 24_000, 22_000
  ),
  "1, under a folder": (
    "4:memory:/a/b\n0::/\n", V1.format(top="/"),
    {"memory": one(FULL, MB), "memory/a": one(*SMALL), "memory/a/b": one(FULL, 9)}, 600, 200,
  ),
  "1, a container's own": (
    "5:cpu,cpuacct:/docker/7\n4:memory:/docker/7\n", V1.format(top="/docker/7"),
    {"memory": one(*SMALL)}, 600, 200,
  ),
  "1, no limit": ("4:memory:/a\n", V1.format(top="/"), {"memory/a": one(FULL, 9)}, 24_000, 22_000),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_memory_is_the_smaller_of_the_machine_and_its_groups(root, case):
  *tree, limit, free = CASES[case]
  found = host.memory(root(*tree))
  assert (found.limit // MB, found.free // MB) == (limit, free)
  assert found.grouped == (limit < 24_000)
  assert ("of this control group" in str(found)) == found.grouped


def test_a_system_that_does_not_say_has_no_memory_to_tell(tmp_path):
  assert host.memory(tmp_path) is None


@pytest.mark.parametrize(
  "own, mounts, groups, quota",
  [
    ("0::/a/b\n", V2, {"a": {"cpu.max": "50000 100000"}, "a/b": {"cpu.max": "max 100000"}}, 0.5),
    ("0::/\n", V2, {"": {"cpu.max": "max 100000"}}, None),
    ("4:cpu,cpuacct:/a\n", V1.format(top="/"),
     {"cpu,cpuacct/a": {"cpu.cfs_quota_us": 25000, "cpu.cfs_period_us": 100000}}, 0.25),
    ("4:cpu,cpuacct:/a\n", V1.format(top="/"),
     {"cpu,cpuacct/a": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}}, None),
  ],
)  # fmt: skip
def test_cores_are_those_of_the_affinity_within_the_quota(root, own, mounts, groups, quota):
  affine = float(len(os.sched_getaffinity(0)))
  assert host.cores(root(own, mounts, groups)) == (affine if quota is None else quota)


@pytest.mark.parametrize(
  "text, name",
  [("processor\t: 0\nmodel name\t: Cpu X 9000\nmodel name\t: Y\n", "Cpu X 9000"),
   ("Model\t\t: Board 5\n", "Board 5")],
)  # fmt: skip
def test_the_processor_has_the_name_that_the_system_gives_it(tmp_path, text, name):
  (tmp_path / "proc").mkdir()
  (tmp_path / "proc/cpuinfo").write_text(text)
  assert host.processor(tmp_path) == name
