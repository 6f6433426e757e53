"""Tables ring against token_ring on stated links: python -m experiments.token_ring.simulate."""

import dataclasses

import numpy as np

from jaxmoe.cost.links import LinkProfile, LinkRate
from jaxmoe.plan.context_times import AttentionWork, context_times

TOKENS, DEVICES, HEADS, SIZE = 24_000, 4, 32, 128
RATE = LinkRate(0.0, 12.9e9)
"""A PCIe link on which keys and values of 6,000 tokens take the 7.6 ms that TokenRing tells."""
FLOPS_PER_S = 60e12
"""About half of the peak of an A10 in bfloat16."""


def work(key_heads: int, found_size: int) -> AttentionWork:
  """Returns attention in bfloat16 whose outputs are sent in `found_size` bytes a number."""
  return AttentionWork(
    query_heads=HEADS,
    key_heads=key_heads,
    query_bytes=2.0 * HEADS * SIZE,
    key_bytes=4.0 * key_heads * SIZE,
    found_bytes=float(HEADS * (found_size * SIZE + 4)),
    flops_per_pair=4.0 * HEADS * SIZE,
    flops_per_s=FLOPS_PER_S,
    gradient_bytes=2.0,
  )


def main() -> None:
  """Prints the table."""
  cases = {
    "32 key heads, outputs in bfloat16": (work(32, 2), "full_mesh"),
    "32 key heads, outputs in float32": (work(32, 4), "full_mesh"),
    "8 key heads, outputs in bfloat16": (work(8, 2), "full_mesh"),
    "32 key heads, bfloat16, links of a ring": (work(32, 2), "ring"),
  }
  row = np.ones(TOKENS, np.int32)
  print("| case | K and V, ms a step | Q, ms | found, ms | ring, ms | token_ring, ms |")
  print("| --- | --- | --- | --- | --- | --- |")
  for name, (attention, topology) in cases.items():
    links = LinkProfile(topology, RATE, RATE)
    part = TOKENS // DEVICES
    sent = [
      RATE.seconds(part * size) * 1e3
      for size in (attention.key_bytes, attention.query_bytes, attention.found_bytes)
    ]
    free = dataclasses.replace(attention, flops_per_s=1e30)
    cells = []
    for attend in ("ring", "token_ring"):
      times = [
        next(
          time.seconds * 1e3
          for time in context_times([row], DEVICES, each, links)
          if (time.attend, time.order) == (attend, "zigzag")
        )
        for each in (attention, free)
      ]
      cells.append(f"{times[0]:.0f} ({times[1]:.0f})")
    print("| " + " | ".join([name, *(f"{each:.1f}" for each in sent), *cells]) + " |")


if __name__ == "__main__":
  main()
