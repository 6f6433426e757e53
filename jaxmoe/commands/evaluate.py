"""Scores the held-out documents of a run in bits per byte, beside gzip and xz on the same bytes.

jaxmoe evaluate --workdir=runs/tiny
  --text=FOLDER       scores any files in place of what the run holds out: .jsonl, .parquet and
      .arrow as records, every other file that holds text as a document
  --choices=FILE.jsonl  answers multiple choice questions by likelihood, lines of
      {"question": TEXT, "choices": [TEXT, ...], "answer": INDEX}

Rows are as many and as long as the text needs, --batch_size of them at a time at most; always so
many, each of the context, where what lies beside a token changes what it gets (capacity, experts
that choose, a mask over documents). Scores are written to eval.json, eval_text.json or
eval_choices.json in the workdir.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console

from jaxmoe.commands.process import command_line, jax_settings, run_flags
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output
from jaxmoe.data.corpus import read_documents
from jaxmoe.data.skip_report import plural
from jaxmoe.data.sources.mixed_files import sources_of
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.runs.evaluation import Documents, held_out, score_documents
from jaxmoe.runs.run_loading import LoadedRun
from jaxmoe.runs.score_table import score_table
from jaxmoe.train.console_progress import ConsoleProgress
from jaxmoe.train.multiple_choice import read_questions, score_questions

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run to score.", flag_values=FLAGS)
flags.DEFINE_string("text", None, "Files to score in place of the run's.", flag_values=FLAGS)
flags.DEFINE_string("choices", None, "A .jsonl of questions to answer.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 16, "The most rows scored at a time.", 1, flag_values=FLAGS)


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  if FLAGS.text and FLAGS.choices:
    raise InputError("--text and --choices: give one; each is scored by itself")
  with run_flags.named("text"):
    sources, without = sources_of(FLAGS.text) if FLAGS.text else ([], [])
  questions = read_questions(FLAGS.choices) if FLAGS.choices else None
  name = "eval_text.json" if sources else "eval_choices.json" if questions else "eval.json"
  out = run_flags.need_workdir(FLAGS.workdir).path / name
  read = [path for source in sources for _, path in source.files]
  read += [FLAGS.choices] if FLAGS.choices else []

  def check(tokenizer: Tokenizer) -> None:
    check_output(out, str(out), read, "score a copy of the run, or make it writable")

  run = run_flags.load_run(FLAGS.workdir, check)
  console = ConsoleProgress()
  if questions is not None:
    shape = (FLAGS.batch_size, run.experiment.data.seq_len)
    with console.phase(f"answering {len(questions):,} questions at step {run.step}"):
      found = score_questions(run.decoder, run.params, run.tokenizer, questions, shape)
    result = {"step": run.step, "file": FLAGS.choices, **found}
    write(out, result)
    return 0
  if sources:
    if without:
      console.say(f"left out: {plural(len(without), 'file')} without text, such as {without[0]}")
    with run_flags.as_trained():
      domains, skipped = read_documents(sources, run.experiment.data, run.tokenizer, console.say)
    extra_fields = {"skipped": skipped, "without_text": without}
    score(run, domains, "bytes", out, console, extra_fields)
  else:
    with run_flags.as_trained():
      documents = held_out(run, jax_settings.cache_dir() / "tokenizers", console.say)
    score(run, documents, "held-out bytes", out, console)
  return 0


def score(
  run: LoadedRun,
  documents: Documents,
  what: str,
  path: pathlib.Path,
  console: ConsoleProgress,
  extra_fields: Mapping[str, Any] | None = None,
) -> None:
  """Scores documents, prints the table and writes the file, with what else is told."""
  total = sum(document.num_bytes for several in documents.values() for document in several)
  with console.phase(f"scoring {total:,} {what} at step {run.step}"):
    result = {**score_documents(run, documents, FLAGS.batch_size), **(extra_fields or {})}
  Console().print(score_table(result, "bits" if extra_fields is not None else "held-out bits"))
  write(path, result, shown=False)


def write(path: pathlib.Path, result: dict[str, Any], shown: bool = True) -> None:
  """Writes scores, and prints them unless they were."""
  if shown:
    for name, value in result.items():
      print(f"{name:>16}  {value:.4f}" if isinstance(value, float) else f"{name:>16}  {value}")
  write_output(path, str(path), json.dumps(result, indent=2) + "\n")
  print(f"written to {path}")


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
