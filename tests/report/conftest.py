"""A made-up run with every field of the run files, and a reader of what a report plots."""

import html.parser
import json

import numpy as np
import pytest

from jaxmoe.train.domain_routing import routing_table

DOMAINS, LAYERS, EXPERTS = ("code", "prose"), 3, 8
START = 1_700_000_000.0


def load_of(rng, step, dying):
  load_E = rng.dirichlet(np.full(EXPERTS, 20.0))
  for expert, last in dying.items():
    if step > last:
      load_E[expert] = 0
  return load_E / load_E.sum()


def layer_of(load_E, rng):
  return {
    "load": [round(float(share), 6) for share in load_E],
    "load_entropy": round(float(rng.uniform(0.8, 1)), 5),
    "max_violation": float(load_E.max() * EXPERTS - 1),
    "dead": int((load_E == 0).sum()),
    "drop_rate": round(float(rng.uniform(0, 0.1)), 5),
    "dropped": {"full": 3.0},
    "effective_k": 1.9,
    "router_z": 2.0,
  }


def evaluation(rng, step):
  rows_RE = rng.multinomial(64, np.full(EXPERTS, 1 / EXPERTS), size=20)
  domain_R = np.repeat([0, 1], 10)
  tables = {str(n): routing_table(rows_RE + n, domain_R, DOMAINS) for n in range(LAYERS)}
  scores = {"code": 2 - step / 1000, "prose": 3 - step / 1000}
  return {"bits_per_byte": 2.5 - step / 1000, "domains": scores, "routing": tables}


def made_line(step, rng, dying):
  """Returns the line of a step; `dying` has the last step of experts of layer 1."""
  layers = {
    str(n): layer_of(load_of(rng, step, dying if n == 1 else {}), rng) for n in range(LAYERS)
  }
  seconds = {"step": 0.5, "data": 0.1, "checkpoint": 0.0}
  line = {
    "step": step, "loss": None if step == 7 else round(8 / step**0.3, 6),
    "grad_norm": 1.0 / step, "learning_rate": 1e-3, "skipped": int(step >= 7), "tokens": 128.0,
    "total_loss": 9.0, "load_balance_global": 1.1, "router_z": 2.0, "layers": layers,
    "data": {name: {"tokens": step * 64, "documents": step, "bytes": step * 200, "epochs": 0.1}
             for name in DOMAINS},
    "time": {"unix_s": START + 10 + 0.6 * step, "tokens_per_s": 200.0, "mfu": 0.1,
             "data_share": 0.01, "data_mb_per_s": 1.0, "seconds": seconds},
  }  # fmt: skip
  if step % 25 == 0:
    line["eval"] = evaluation(rng, step)
  return line


def made_events(steps):
  end = START + 10 + 0.6 * steps
  compressors = {"gzip -9": {"code": 2.1, "prose": 2.9}, "xz -9": {"code": 1.8, "prose": 2.898}}
  sizes = {"train": {"documents": 9, "bytes": 900}, "held_out": {"documents": 1, "bytes": 99}}
  data = {"digest": "abc", "domains": dict.fromkeys(DOMAINS, sizes), "skipped": {},
          "slice": {"code": {"bytes": 33, "of": 60}, "prose": {"bytes": 33, "of": 180}},
          "compressors": compressors}  # fmt: skip
  recipe = {"name": "configs/tiny.py", "changes": {"train.seed": [0, 5]}}
  listed = [
    ("process", START + 2, {"pid": 1, "host": "h", "python": "3.11", "jax": "0.10",
                            "devices": "1 x cpu"},
     {"started_unix_s": START, "last_alive_unix_s": None, "seconds": {"start": 2.0}}),
    ("start", START + 6, {"params": 1234, "recipe": recipe, "data": data},
     {"seconds": {"start": 4.0}}),
    ("compiled", START + 10, {}, {"seconds": {"compile": 4.0}}),
    ("skipped", START + 15, {"step": 7, "why": "not finite", "loss": None, "grad_norm": None}, {}),
    ("save_failed", START + 20, {"step": 20, "why": "<b>No space</b> left"}, {}),
    ("done", end + 1, {"step": steps, "digest": "d"}, {"seconds": {"checkpoint": 1.0}}),
  ]  # fmt: skip
  return [
    {"event": kind, **fields, "time": {"unix_s": at, **clock}} for kind, at, fields, clock in listed
  ]


def write_lines(path, plain):
  path.write_text("".join(json.dumps(one) + "\n" for one in plain))


@pytest.fixture(scope="session")
def run_of():
  """Returns a function (folder, steps, seed, dying) that writes a made-up run and its lines."""

  def make(folder, steps=100, seed=0, dying=()):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = [made_line(step, rng, dict(dying)) for step in range(1, steps + 1)]
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "events.jsonl", made_events(steps))
    sections = [f"## step {n}\n\n```text\nsample <i>{n}</i>\n```\n" for n in (0, 40, 50, 60, 100)]
    (folder / "samples.md").write_text("\n".join(sections) + "\n")
    config = {"train": {"seed": 5, "num_steps": 1_500_000, "note": "<u>"}}
    (folder / "config.json").write_text(json.dumps(config))
    return lines

  return make


class Page(html.parser.HTMLParser):
  """What a page holds: the numbers of its pictures by title, its text, and what is not closed."""

  VOID = ("meta", "input", "br", "hr", "link", "img")

  def __init__(self, text):
    super().__init__()
    self.plots, self.words, self.open, self.tags = {}, [], [], []
    self._plotted = False
    self.feed(text)
    self.close()

  def handle_starttag(self, name, attributes):
    self.tags.append((name, dict(attributes)))
    self._plotted = name == "script"
    if name not in self.VOID:
      self.open.append(name)

  def handle_startendtag(self, name, attributes):
    self.tags.append((name, dict(attributes)))

  def handle_endtag(self, name):
    assert self.open and self.open.pop() == name, f"</{name}> closes nothing"
    self._plotted = False

  def handle_data(self, data):
    if self._plotted:
      numbers = json.loads(data)
      assert numbers["chart"] not in self.plots, "titles are unique"
      self.plots[numbers["chart"]] = numbers
    else:
      self.words.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="session")
def page_of():
  """Returns a function from the path of a page to what it holds."""
  return lambda path: Page(path.read_text())
