"""A study as Markdown: loss by budget, agreement with the routers, difficulty."""

from __future__ import annotations

from typing import Any


def study_page(found: dict[str, Any]) -> str:
  """Returns what a study found as Markdown."""
  curves, router, luck = found["curves"], found["router"], found["selection"]
  rows = list(zip(found["budgets"], *(curves[name] for name in curves)))
  kinds = [str(kind) for kind in found["kinds"]]
  matrix = [
    [kind, *map(str, row)] for kind, row in zip(kinds, found["agreement"]["router_by_oracle"])
  ]
  by_layer = zip(map(str, found["depths"]), map(_shown, found["agreement"]["by_layer"]))
  difficulty = sorted(
    zip(found["difficulty"]["gains"], found["difficulty"]["losses"]), reverse=True
  )
  small = found["difficulty"]["base"]
  return "\n".join([
    f"# Oracle routing at step {found['step']}",
    "",
    f"**{found['warning']}**",
    "",
    f"{found['tokens']} held-out tokens; method {found['method']}; the past was routed by "
    f"{found['past']}. Losses in nats; budgets in FLOPs of experts a token, at most.",
    "",
    "## Loss by budget", "",
    *_table(["budget", *curves], [[f"{row[0]:,.0f}", *map(_shown, row[1:])] for row in rows]),
    "",
    "`shuffled` is the same search for the label of another text. The routers: "
    f"{router['loss']:.4f} at {router['flops']:,.0f} FLOPs, "
    f"where the oracle has {router['oracle_at_its_flops']:.4f}.",
    "",
    *_table(["one expert everywhere", "loss"],
            [[kind, _shown(loss)] for kind, loss in found["uniform"].items()]),
    "",
    "## Agreement at the routers' FLOPs", "",
    *_table(["router \\ oracle", *kinds], matrix),
    "",
    *_table(["layer", "share alike"], [list(row) for row in by_layer]),
    "",
    "## Difficulty", "",
    f"The loss with expert {small} everywhere, and what the oracle gains on it. Over all tokens it "
    f"gains {luck['gain']:.4f}; with shuffled labels, by luck alone, "
    f"{luck['gain_of_shuffled_labels']:.4f}. A pass without a cache changes the oracle's losses by "
    f"{luck['largest_change_without_cache']:.1e} at most.",
    "",
    *_table(["gain", "loss"], [[_shown(gain), _shown(loss)] for gain, loss in difficulty]),
    "",
  ])  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
  """Returns the lines of a table."""
  lines = [head, ["---"] * len(head), *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]


def _shown(value: float | None) -> str:
  return "-" if value is None else f"{value:.4f}"
