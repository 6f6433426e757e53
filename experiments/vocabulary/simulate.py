"""Tables a head over all stages against one on the last.

python -m experiments.vocabulary.simulate
"""

from jaxmoe.parallel.pipelines import PIPELINES, Vocabulary, with_vocabulary
from jaxmoe.parallel.pipelines.simulation import Durations, simulate, simulate_ticks
from jaxmoe.parallel.stages import cut_by_cost

DEVICES, MICRO, LAYERS, DIM = 8, 32, 32, 4096
MEAN = LAYERS / DEVICES


def last_stage(layers_of_head: float, even: bool) -> Durations:
  """Returns durations with the head on the last stage, layers cut evenly or by cost."""
  costs = [1.0] * LAYERS
  costs[-1] += layers_of_head
  counts = (LAYERS // DEVICES,) * DEVICES if even else cut_by_cost(costs, DEVICES)
  loads = [float(count) for count in counts]
  loads[-1] += layers_of_head
  return Durations(scale=tuple(load / MEAN for load in loads))


def spread(layers_of_head: float, algorithm: int) -> Durations:
  """Returns durations of a head over all devices: one of its three products is in S or in two."""
  product = layers_of_head / MEAN / DEVICES
  early = 1 if algorithm == 1 else 2
  return Durations(scores=early * product, head_weights=(3 - early) * product)


def main() -> None:
  """Prints the table: time of a step with the head last over that with a head over all."""
  table = PIPELINES["1f1b"](DEVICES, MICRO)
  tables = {one: with_vocabulary(table, Vocabulary(one), "true") for one in (1, 2)}
  in_ticks = with_vocabulary(table, Vocabulary(2), "ticks")
  print("| vocabulary | head, layers | head last, even | head last, by cost | algorithm 1 "
        "| algorithm 2 | gain, even | gain, by cost | in ticks, even |")  # fmt: skip
  print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
  for vocabulary in (32_000, 64_000, 128_000, 256_000):
    head = 2 * DIM * vocabulary / (24 * DIM**2)
    times = [simulate(table, last_stage(head, even)).time for even in (True, False)]
    spreads = [simulate(tables[one], spread(head, one)).time for one in (1, 2)]
    ticks = simulate_ticks(table, last_stage(head, True)).time
    ticks /= simulate_ticks(in_ticks, spread(head, 2)).time
    cells = [f"{vocabulary:,}", f"{head:.1f}", *(f"{time:.0f}" for time in (*times, *spreads))]
    cells += [f"{time / spreads[1] - 1:.0%}" for time in times] + [f"{ticks - 1:.0%}"]
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
