"""Tables dualpipe_v against zb_v: python -m experiments.dualpipe_v.simulate."""

from jaxmoe.parallel.pipelines import PIPELINES
from jaxmoe.parallel.pipelines.simulation import Durations, simulate, simulate_ticks

DEVICES, MICRO = 8, 32


def main() -> None:
  """Prints the table: time of a step over that of products alone."""
  print("| exchange | pipeline | true dependencies | lock-step ticks | in flight |")
  print("| --- | --- | --- | --- | --- |")
  for exchange in (0.0, 0.25, 0.5, 1.0):
    durations = Durations(
      forward=1.0 + exchange, backward=1.0 + exchange, weights=1.0, overlapped=3.0
    )
    for name in ("1f1b", "zb_h1", "zb_v", "v_half", "dualpipe_v"):
      table = PIPELINES[name](DEVICES, MICRO)
      true, ticks = simulate(table, durations), simulate_ticks(table, durations)
      work = 3.0 * MICRO * table.placement.num_local
      print(
        f"| {exchange} | {name} | {true.time / work:.3f} | {ticks.time / work:.3f} | "
        f"{max(true.in_flight):.1f} |"
      )


if __name__ == "__main__":
  main()
