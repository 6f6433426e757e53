"""Times of attention over `context` devices, by strategy: predicted from lengths and links.

A step of a ring lasts as long as the products of its busiest device or as its messages; what is
sent is what `parallel/attend` sends. Predicted for one layer and row, forward and backward; nothing
here was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxmoe.cost.links import LinkProfile
from jaxmoe.parallel.block_order import Order, order_blocks, visible_pairs

BACKWARD = 2.5
"""Products of a backward pass over those of a forward pass: five of a pair where there were two."""
STRATEGIES = ("gather", "ring", "token_ring", "ulysses")


@dataclasses.dataclass(frozen=True)
class AttentionWork:
  """What attention of one layer computes and sends.

  Attributes:
    query_heads, key_heads: N and K; K is 1 for latents.
    query_bytes: Of a token's queries.
    key_bytes: Of a token's keys and values, or its latent.
    found_bytes: Of what a query found: output and log-sum-exp, as they are sent.
    gradient_bytes: Of gradients of keys, over `key_bytes` (float32 over bfloat16 is 2).
    flops_per_pair: Of all heads, forward.
    flops_per_s: What a device does.
  """

  query_heads: int
  key_heads: int
  query_bytes: float
  key_bytes: float
  found_bytes: float
  flops_per_pair: float
  flops_per_s: float
  gradient_bytes: float = 1.0


@dataclasses.dataclass(frozen=True)
class StrategyTime:
  """One strategy.

  Attributes:
    attend: Its name.
    order: The order of blocks.
    seconds: Forward and backward.
    products_s: Of that, what the busiest devices' products take.
    imbalance: The busiest device's pairs, summed over steps, over the mean.
    refused: Why it is not to be had; None where it is. Its times are infinite.
  """

  attend: str
  order: str
  seconds: float
  products_s: float
  imbalance: float
  refused: str | None = None

  @property
  def waits_s(self) -> float:
    """What devices wait for links."""
    return self.seconds - self.products_s


def context_times(
  rows: Sequence[np.ndarray],
  context: int,
  work: AttentionWork,
  links: LinkProfile,
  rule: Callable[[str, str], str | None] = lambda attend, order: None,
) -> tuple[StrategyTime, ...]:
  """Returns the strategies' times, in each order of blocks where that matters, the least first.

  Args:
    rows: The documents of each row, (L,) each, from 1; 0 is padding. Times are their mean.
    context: Devices over which a row is spread.
    work: Of one layer.
    links: How devices are joined.
    rule: Says of a strategy and an order why they are refused, None where they are not; for what
      heads do not tell.

  Raises:
    InputError: Rows do not divide into blocks, or the links are of other devices.
  """
  links.check_size(context)
  orders: tuple[Order, ...] = ("plain", "zigzag", "balanced")
  pairs = {
    order: [visible_pairs(row, order_blocks(row, context, order), context) for row in rows]
    for order in orders
  }
  found = [
    _mean_time(
      _Case(attend, order, refusal(attend, work, context) or rule(attend, order)),
      pairs[order],
      _Times(len(rows[0]) // context, context, work, links),
    )
    for attend in STRATEGIES
    for order in (orders if attend != "ulysses" else orders[:1])
  ]
  return tuple(sorted(found, key=lambda each: each.seconds))


def refusal(attend: str, work: AttentionWork, context: int) -> str | None:
  """Returns why heads do not allow a strategy, None where they do."""
  if attend != "ulysses":
    return None
  if work.query_heads % context:
    return f"{work.query_heads} query heads do not divide over {context} devices"
  if work.key_heads % context and context % work.key_heads:
    return f"{work.key_heads} key heads neither divide over {context} devices nor repeat over them"
  return None


def choice_text(times: Sequence[StrategyTime]) -> str:
  """Returns which strategy takes least, and why, in one line."""
  best = times[0]
  second = next((each for each in times if each.attend != best.attend and not each.refused), None)
  waits = "without waiting for links" if best.waits_s < 0.01 * best.seconds else (
    f"{best.waits_s / best.seconds:.0%} of it waiting for links"
  )  # fmt: skip
  text = f"attend={best.attend} order={best.order} takes least: {best.seconds * 1e3:.3g} ms"
  text += f", {waits}"
  if second is None:
    return text
  more = "products of its busiest devices" if (
    second.products_s - best.products_s > second.waits_s - best.waits_s
  ) else "waiting for links"  # fmt: skip
  return f"{text}; {second.attend} takes {second.seconds / best.seconds:.2f} times that, by {more}"


@dataclasses.dataclass(frozen=True)
class _Case:
  """A strategy, an order, and why they are refused."""

  attend: str
  order: str
  refused: str | None


def _mean_time(case: _Case, pairs: Sequence[np.ndarray], times: _Times) -> StrategyTime:
  """Returns one strategy's time over rows."""
  even = float(np.mean([each.sum() / times.size for each in pairs]))
  steps = np.mean([each.max(axis=0) for each in pairs], axis=0)
  whole = float(np.mean([each.sum(axis=1).max() for each in pairs]))
  busiest = {"ulysses": even, "gather": whole}.get(case.attend, float(steps.sum()))
  pair_s = times.work.flops_per_pair / times.work.flops_per_s
  products = busiest * pair_s * (1 + BACKWARD)
  if case.refused:
    seconds = float("inf")
  elif case.attend == "gather":
    seconds = products + times.gather()
  elif case.attend == "ulysses":
    seconds = products + times.ulysses()
  elif case.attend == "ring":
    seconds = times.ring(steps * pair_s)
  else:
    seconds = times.token_ring(steps * pair_s)
  uneven = busiest / max(even, 1.0)
  return StrategyTime(case.attend, case.order, seconds, products, uneven, case.refused)


@dataclasses.dataclass(frozen=True)
class _Times:
  """What strategies send, of `tokens` a device."""

  tokens: int
  size: int
  work: AttentionWork
  links: LinkProfile

  def gather(self) -> float:
    """Returns the time to gather keys and values, and to sum their gradients back."""
    return 2 * self.links.gather_s(self.tokens * self.work.key_bytes, self.size)

  def ulysses(self) -> float:
    """Returns the time of two exchanges forward and two backward."""
    work = self.work
    again = max(1, self.size // work.key_heads)
    before = work.query_bytes + again * work.key_bytes
    each = (before, work.query_bytes, work.query_bytes, before)
    return sum(self.links.exchange_s(self.tokens * found, self.size) for found in each)

  def shift(self, bytes_a_token: float, distance: int) -> float:
    """Returns the time of messages so many places on; none where nothing is sent."""
    sent = self.tokens * bytes_a_token
    return self.links.shift_s(sent, distance, self.size) if sent and distance % self.size else 0.0

  def ring(self, products: np.ndarray) -> float:
    """Returns the time in which keys go around, and again with their gradients."""
    keys, last = self.work.key_bytes, self.size - 1
    gradients = keys * self.work.gradient_bytes
    total = self.shift(keys, last)
    for step in range(self.size):
      total += max(products[step], self.shift(keys if step < last else 0, 1))
      sent = (keys if step > 1 else 0) + (gradients if step < last else 0)
      total += max(BACKWARD * products[step], self.shift(sent, -1))
    return total

  def token_ring(self, products: np.ndarray) -> float:
    """Returns the time in which queries go around and what they find goes back."""
    work, last = self.work, self.size - 1
    gradients = work.query_bytes
    total = max(products[0], self.shift(work.query_bytes, -last))
    total += self.shift(2 * work.query_bytes, -last)
    for back in range(last, 0, -1):
      on = back > 1
      returns = back + 1 if back < last else 0
      total += max(products[back], self.both(work.query_bytes * on, work.found_bytes, returns))
      both = self.both(2 * work.query_bytes * on, gradients, returns)
      total += max(BACKWARD * products[back], both)
    total += self.shift(work.found_bytes, 1)
    return total + max(BACKWARD * products[0], self.shift(gradients, 1))

  def both(self, on: float, back: float, distance: int) -> float:
    """Returns the time of messages to the next device beside others `distance` places on.

    On links of their own, or the other way around a ring, both go at once.
    """
    times = (self.shift(on, 1), self.shift(back, distance) if distance else 0.0)
    apart = self.links.topology == "full_mesh" or not self.links.goes_right(distance, self.size)
    return max(times) if apart else sum(times)
