"""Lines that say how a run stands: state, step, speed, scores, checkpoints, loads by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from jaxmoe.status.load_table import BLOCKS, LETTERS, load_table
from jaxmoe.status.run_status import RECENT, RunStatus
from jaxmoe.status.text_columns import ago, clock, fit, labelled, shown
from jaxmoe.train.held_out_slice import slice_of
from jaxmoe.train.progress import BESIDE, step_s


def status_lines(
  snapshot: RunStatus, rows: int | None = None, encoding: str | None = "utf-8"
) -> list[str]:
  """Returns the lines of the report, each at most 80 cells wide and without control characters.

  Args:
    snapshot: What the run's files say.
    rows: Lines that the terminal has; None to leave no layer out.
    encoding: That of the output; signs it lacks are replaced.
  """
  lines = [*_state(snapshot), *_step(snapshot), *_scores(snapshot), *_skipped(snapshot)]
  lines += _upkeep(snapshot)
  layers = snapshot.lines[-1].get("layers") if snapshot.lines else None
  if layers:
    signs = BLOCKS if shown(BLOCKS, encoding) == BLOCKS else LETTERS
    fitting = None if rows is None else rows - len(lines) - 4
    lines += ["", *load_table(layers, fitting, signs)]
  return [shown(fit(line), encoding) for line in lines]


def _state(snapshot: RunStatus) -> Iterator[str]:
  state, process = snapshot.state, snapshot.last_event("process") or {}
  alive = f"last sign of life {ago(snapshot.now_unix_s - snapshot.alive_unix_s)} ago"
  end = snapshot.last_event("failed", "stalled") or {}
  why = {
    "running": f"running, process {process.get('pid', '?')}; {alive}",
    "done": f"done; {alive}",
    "stopped": f"stopped as it was told to; {alive}; the same command goes on",
    "failed": f"failed with exit code {end.get('code', '?')}; {alive}",
    "stalled": f"stalled, exit code 42: no step after {end.get('phase', '?')}; {alive}",
    "killed": f"killed: no process runs here, and none said that it ended; {alive}",
    "untrained": "not trained yet: no process has worked on it",
    "elsewhere": f"not seen from here: it ran on {process.get('host')}; {alive}",
  }
  yield from labelled("run", [str(snapshot.path)])
  yield from labelled("state", [*why[state].split("; ")], gap="; ")
  if state == "failed":
    words = str(end.get("why", "")).split()
    yield from labelled("why", words, gap=" ")


def _step(snapshot: RunStatus) -> Iterator[str]:
  total = snapshot.config.get("train", {}).get("num_steps")
  if not snapshot.lines:
    yield from labelled("step", [f"none of {_count(total)} yet"])
    return
  line = snapshot.lines[-1]
  items = [f"{line['step']:,} of {_count(total)}"]
  if isinstance(total, int) and total > 0:
    items[0] += f" ({min(line['step'] / total, 1):.1%})"
  tokens = _tokens(line)
  items += [f"{tokens:,.0f} tokens"] if tokens else []
  if snapshot.state == "running" and isinstance(total, int):
    items.append(f"{clock(_step_s(snapshot) * (total - line['step']))} left")
  yield from labelled("step", items)
  yield from labelled("training", _learned(snapshot.lines))
  clocks = [line.get("time", {}) for line in snapshot.lines]
  speed = [c["tokens_per_s"] for c in clocks if "tokens_per_s" in c]
  mfu = [c["mfu"] for c in clocks if "mfu" in c]
  if speed and mfu:
    shown_speed = f"{statistics.median(speed):,.0f} tokens/s, MFU {statistics.median(mfu):.1%}"
    yield from labelled("speed", [f"{shown_speed} (median of the last {min(len(speed), RECENT)})"])


def _learned(lines: list[dict[str, Any]]) -> list[str]:
  """Returns what the last line says of learning; of a step with labels, where there is one."""
  line = next((line for line in reversed(lines) if line.get("labels") != 0), lines[-1])
  loss = line.get("loss")
  none = "no labels" if line.get("labels") == 0 else "loss not finite"
  message = none if loss is None else f"loss {loss:.4f} nats/token"
  message += f" at step {line['step']:,}, none labelled since" if line is not lines[-1] else ""
  return [message, *_numbers(line, ("grad_norm", "learning_rate"), ".3g")]


def _scores(snapshot: RunStatus) -> Iterator[str]:
  if snapshot.scored is not None:
    part = slice_of(snapshot.last_event("start") or {}, snapshot.config)
    scores, step = snapshot.scored["eval"], snapshot.scored["step"]
    overall = part.overall(scores.get("domains", {}), scores.get("bits_per_byte"))
    items = _score_lines(scores, step, "all" if part.is_whole else "a slice", overall)
    sizes = [part.sizes] if part.sizes and not part.is_whole else []
    yield from labelled("held out", items + sizes)
  if snapshot.whole is not None:
    scores, step = snapshot.whole, snapshot.whole["step"]
    yield from labelled("eval.json", _score_lines(scores, step, "all", scores.get("bits_per_byte")))


def _score_lines(scores: dict[str, Any], step: int, what: str, overall: float | None) -> list[str]:
  """Returns bits per byte of all domains together and of each."""
  items = [f"bits/byte of {what} at step {step:,}: {_bits(overall)}"]
  return items + [f"{name} {_bits(value)}" for name, value in scores.get("domains", {}).items()]


def _skipped(snapshot: RunStatus) -> Iterator[str]:
  """Yields what of the data was not read when the run began, if anything."""
  found = (snapshot.last_event("start") or {}).get("data", {}).get("skipped", {})
  items = [
    f"{domain}: {_of(sum(flaws.values()), 'bad record')} ({', '.join(flaws)})"
    for domain, flaws in found.get("counts", {}).items()
  ]
  items += [
    f"{domain}: at least {_of(lost['bytes'], 'byte')} lost of {_of(lost['files'], 'file')}"
    for domain, lost in found.get("broken", {}).items()
  ]
  if items:
    yield from labelled("not read", items)


def _upkeep(snapshot: RunStatus) -> Iterator[str]:
  last = snapshot.lines[-1] if snapshot.lines else {}
  counts = {"skipped steps": last.get("skipped", 0)}
  if last.get("unlabelled"):
    counts["steps without labels"] = last["unlabelled"]
  for name, kind in (("rollbacks", "rollback"), ("failed saves", "save_failed")):
    counts[name] = snapshot.count(kind)
  for name, kind in (("checkpoints set aside", "set_aside"), ("sinks failed", "sink_failed")):
    if snapshot.count(kind):
      counts[name] = snapshot.count(kind)
  yield from labelled("trouble", [f"{count} {name}" for name, count in counts.items()])
  saved = sorted(snapshot.checkpoints)
  if saved:
    age = ago(snapshot.now_unix_s - snapshot.checkpoints[saved[-1]])
    others = ", ".join(f"{step:,}" for step in saved[:-1])
    items = [f"step {saved[-1]:,}, {age} ago", *([f"also {others}"] if others else [])]
    yield from labelled("saved", items)
  else:
    yield from labelled("saved", snapshot.missing.split() or ["no checkpoint yet"], gap=" ")
  if snapshot.goodput is not None:
    yield from labelled("time", str(snapshot.goodput).split(), gap=" ")


def _numbers(line: dict[str, Any], names: tuple[str, ...], form: str) -> list[str]:
  found = [(name, line.get(name)) for name in names]
  return [f"{name.replace('_', ' ')} {value:{form}}" for name, value in found if value is not None]


def _tokens(line: dict[str, Any]) -> float:
  """Returns the tokens so far: those handed out, or the last step's times the steps."""
  handed_out = sum(part.get("tokens", 0) for part in line.get("data", {}).values())
  return handed_out or line["step"] * (line.get("tokens") or 0)


def _step_s(snapshot: RunStatus) -> float:
  """Returns the wall time of a step, with its share of what comes every so many of them."""
  seconds = step_s(line.get("time", {}).get("seconds", {}) for line in snapshot.lines)
  spent = snapshot.goodput.seconds if snapshot.goodput is not None else {}
  trained = sum(spent.get(name, 0.0) for name in ("step", "data"))
  beside = sum(spent.get(name, 0.0) for name in BESIDE)
  return seconds * (1 + beside / trained) if trained else seconds


def _bits(value: float | None) -> str:
  return "no value" if value is None or math.isnan(value) else f"{value:.3f}"


def _of(number: int, noun: str) -> str:
  return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _count(value: Any) -> str:
  return f"{value:,}" if isinstance(value, int) else "?"
