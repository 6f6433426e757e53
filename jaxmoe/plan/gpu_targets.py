"""GPUs that are not there, as XLA is told of them when it compiles for their kind.

Numbers are those of data sheets and of CUDA's device query; XLA chooses tiles, fusions and the size
of shared memory by them. Libraries that it calls are taken to be of the versions named.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTarget:
  """A kind of GPU.

  Attributes:
    kind: As JAX names it.
    memory: Bytes.
    capability: CUDA's compute capability, major and minor.
    cores: Streaming multiprocessors.
    shared: Bytes of shared memory that a block may opt in to; a core has 1 KiB more.
    l2: Bytes of the second-level cache.
    bandwidth: Bytes a second of memory.
    clock_ghz: Of a core, boosted.
  """

  kind: str
  memory: int
  capability: tuple[int, int]
  cores: int
  shared: int
  l2: int
  bandwidth: int
  clock_ghz: float

  @property
  def text(self) -> str:
    """The `GpuTargetConfigProto` of XLA, as text."""
    major, minor = self.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared + 1024}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
device_description_str: "{self.kind}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
"""


_H200 = GpuTarget(
  "NVIDIA H200", memory=139 << 30, capability=(9, 0), cores=132, shared=232_448, l2=50 << 20,
  bandwidth=4_800_000_000_000, clock_ghz=1.98,
)  # fmt: skip
GPU_TARGETS = {
  "h200": _H200,
  "h100": dataclasses.replace(
    _H200, kind="NVIDIA H100 80GB HBM3", memory=79 << 30, bandwidth=3_350_000_000_000
  ),
}
"""By the name that a topology begins with."""
