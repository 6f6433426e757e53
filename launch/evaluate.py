"""Scores the held-out documents of a run in bits per byte, beside gzip and xz on the same bytes.

python -m launch.evaluate --workdir=runs/tiny
"""

from __future__ import annotations

import json

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.train.evaluate import compressors, evaluate
from jaxmoe.train.narrator import Narrator
from jaxmoe.train.workdir import write_whole
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run to score.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 16, "Windows scored at a time.", 1, flag_values=FLAGS)


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  run = cli.load_run(FLAGS.workdir)
  data = run.experiment.data
  narrator = Narrator()
  corpus = open_corpus(data, cli.cache_dir() / "tokenizers", progress=narrator.say)
  train = run.experiment.train
  trained_on = run.data_fingerprint  # nothing, where the run was converted
  if trained_on not in (None, corpus.fingerprint(train.batch_size, train.seed)):
    raise InputError(
      f"{run.workdir.path}: the run was trained on other data than its config gives on this "
      "machine (other files?), so what is held out may have been seen; score where it was trained"
    )
  domains = {name: corpus.held_out(name) for name in corpus.domains}
  total = sum(document.num_bytes for documents in domains.values() for document in documents)
  shape = (FLAGS.batch_size, data.seq_len)
  with narrator.phase(f"scoring {total:,} held-out bytes at step {run.step}"):
    scores = evaluate(run.decoder, run.params, domains, run.tokenizer.eod_id, shape)
  result = {"step": run.step, **scores, "compressors": compressors(domains)}
  write_whole(run.workdir.evaluation, json.dumps(result, indent=2) + "\n")
  Console().print(table(result))
  print(f"written to {run.workdir.evaluation}")
  return 0


def table(result: dict) -> Table:
  """Returns the scores as a table: a row a domain, the model first."""
  shown = Table(title=f"held-out bits per byte at step {result['step']}")
  columns = ["domain", "model", *result["compressors"]]
  for column in columns:
    shown.add_column(column, justify="left" if column == "domain" else "right")
  for domain, bits in result["domains"].items():
    scores = [of.get(domain) for of in result["compressors"].values()]
    others = ["-" if score is None else f"{score:.3f}" for score in scores]
    shown.add_row(domain, f"{bits:.3f}", *others)
  return shown


if __name__ == "__main__":
  cli.run(main, FLAGS, __doc__)
