"""Searches the best expert of each layer for single tokens of a run, and compares its routers.

jaxmoe oracle --workdir=runs/duo [--tokens=32] [--method=beam] [--budgets=0.5,1]

Writes oracle.json and oracle.md into the workdir, or into --out. The oracle looks at the token to
be predicted: it is a bound on what routing could gain, no model. Budgets are FLOPs of experts, as
shares of what the dearest pattern costs. Tokens are drawn from held-out documents.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags

from jaxmoe.commands.process import command_line, jax_settings, run_flags
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output
from jaxmoe.data.corpus import open_corpus
from jaxmoe.routing_oracle import METHODS, LastToken, Patterns, draw_tokens, study, study_page
from jaxmoe.train.console_progress import ConsoleProgress

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run to look at.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder to write into.", flag_values=FLAGS)
flags.DEFINE_integer("tokens", 32, "How many tokens are searched.", 2, flag_values=FLAGS)
flags.DEFINE_integer("context", 64, "The most tokens before them.", 1, flag_values=FLAGS)
flags.DEFINE_enum("method", "exhaustive", list(METHODS), "How to look.", flag_values=FLAGS)
flags.DEFINE_integer("samples", 1000, "Patterns tried by sampled.", flag_values=FLAGS)
flags.DEFINE_integer("width", 8, "Of the beam.", flag_values=FLAGS)
flags.DEFINE_integer("sweeps", 4, "Of coordinate.", flag_values=FLAGS)
flags.DEFINE_list("budgets", ["0.25", "0.5", "0.75", "1"], "Shares, rising.", flag_values=FLAGS)
flags.DEFINE_list("kinds", [], "Experts to choose among; -1 skips.", flag_values=FLAGS)
flags.DEFINE_integer("past", None, "The expert earlier tokens had; else the routers'.",
                     flag_values=FLAGS)  # fmt: skip
flags.DEFINE_integer("random", 100, "Random patterns a token.", 1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of tokens and random patterns.", 0, flag_values=FLAGS)


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  workdir = run_flags.need_workdir(FLAGS.workdir)
  out = pathlib.Path(FLAGS.out or workdir.path)
  experiment = workdir.experiment()
  if not out.is_dir():
    raise InputError(f"--out={out}: no such folder; make it, or leave --out out")
  files = [out / name for name in ("oracle.json", "oracle.md")]
  for file in files:
    check_output(file, f"--out={out}: {file.name}", workdir.needed)
  patterns = Patterns.of(experiment.model, tuple(numbers("kinds", int)))
  if FLAGS.past is not None and FLAGS.past not in patterns.kinds:
    raise InputError(f"--past={FLAGS.past}: must be one of the kinds {list(patterns.kinds)}")
  top = float(patterns.flops_LK.max(axis=1).sum())
  budgets = [share * top for share in sorted(numbers("budgets", float))]
  patterns.check(budgets)
  method = METHODS[FLAGS.method](**settings())
  run = run_flags.load_run(FLAGS.workdir)
  console = ConsoleProgress()
  with run_flags.as_trained():
    corpus = open_corpus(
      experiment.data, jax_settings.cache_dir() / "tokenizers", progress=console.say
    )
  slots = min(FLAGS.context, experiment.data.seq_len - 1) + 1
  last = LastToken.of(run.decoder, run.params, patterns, slots=slots, policy=FLAGS.past)
  with run_flags.named("tokens"):
    texts = draw_tokens(corpus, FLAGS.tokens, slots, FLAGS.seed)
  with console.phase(f"searching patterns for {len(texts)} tokens"):
    found = study(last, texts, budgets, method, FLAGS.random, FLAGS.seed)
  method_name = " ".join([FLAGS.method, *(f"{name}={value}" for name, value in settings().items())])
  found = {"step": run.step, "method": method_name, **found}
  for file, text in zip(files, (json.dumps(found, indent=2) + "\n", study_page(found))):
    write_output(file, f"--out={out}: {file.name}", text)
  print(study_page(found))
  print(f"written to {out}/oracle.json and {out}/oracle.md")
  return 0


def settings() -> dict[str, int]:
  """Returns the fields of the method that flags set."""
  return {
    "exhaustive": {},
    "sampled": {"num": FLAGS.samples, "seed": FLAGS.seed},
    "beam": {"width": FLAGS.width},
    "coordinate": {"sweeps": FLAGS.sweeps},
  }[FLAGS.method]


def numbers(flag: str, kind: type) -> list[Any]:
  """Returns the numbers of a flag that is a list.

  Raises:
    InputError: an item is none.
  """
  texts = FLAGS[flag].value or []
  try:
    return [kind(text) for text in texts]
  except ValueError:
    raise InputError(f"--{flag}={','.join(texts)}: expected numbers") from None


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
