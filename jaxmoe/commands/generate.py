"""Continues prompts with the model of a run.

jaxmoe generate --workdir=runs/tiny --prompt='def main(' [--prompt=... --max_tokens=64]

With --chat a prompt is what a user says, after what --system says, and stands in the format that
the run was trained in: the chat template that came with the tokenizer, or that of data.chat.
Special tokens that it spells are text; those that the model writes are left out, unless --special
asks for them. A terminal is shown escapes in the place of control characters; a pipe or a file gets
the text as it is.
"""

from __future__ import annotations

import sys

import numpy as np
from absl import flags

from jaxmoe.commands.process import command_line, jax_settings, run_flags
from jaxmoe.conversion.hf_files import origin_of
from jaxmoe.core.errors import InputError
from jaxmoe.core.terminal import escaped
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.models.generate import Sampling
from jaxmoe.runs.chat_prompt import prompt_format
from jaxmoe.runs.generation import (
  TextStream,
  encode_chat,
  encode_prompts,
  generate_text,
  need_prompts,
)

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run whose model writes.", flag_values=FLAGS)
flags.DEFINE_multi_string("prompt", None, "What to continue; may be repeated.", flag_values=FLAGS)
flags.DEFINE_bool("chat", False, "Prompts are messages of a user.", flag_values=FLAGS)
flags.DEFINE_string("system", "", "Said before a user speaks; with --chat.", flag_values=FLAGS)
flags.DEFINE_bool("special", False, "Show special tokens, too.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 128, "The most tokens to write.", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.", flag_values=FLAGS)
flags.DEFINE_float("top_p", 0.95, "Share of probability to sample from.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=FLAGS)


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  sampling = Sampling(FLAGS.max_tokens, FLAGS.temperature, FLAGS.top_p, FLAGS.seed)
  prompts = FLAGS.prompt or []
  need_prompts(prompts)
  if FLAGS.system and not FLAGS.chat:
    raise InputError("--system is said in a chat; give --chat, too, or leave it out")
  workdir = run_flags.need_workdir(FLAGS.workdir)
  experiment, origin = workdir.experiment(), origin_of(workdir)
  context = experiment.data.seq_len
  first = [("system", FLAGS.system)] if FLAGS.system else []
  asked = prompt_format(origin.folder, experiment, origin.trained) if FLAGS.chat else None

  def encode(tokenizer: Tokenizer) -> list[np.ndarray]:
    if asked is None:
      return encode_prompts(tokenizer, prompts, context)
    return [encode_chat(tokenizer, asked, [*first, ("user", text)], context) for text in prompts]

  run = run_flags.load_run(FLAGS.workdir, check=encode)
  if asked is not None:
    print(f"asked with {asked.name}", file=sys.stderr)
  shown = [""] * len(prompts) if FLAGS.chat else prompts
  stream = TextStream(run.tokenizer, shown, show, FLAGS.special)
  compiler = jax_settings.kept_programs().of(run.experiment)
  generate_text(run, encode(run.tokenizer), sampling, stream.token, compiler=compiler)
  stream.finish()
  return 0


def show(text: str) -> None:
  """Shows text at once; a terminal gets escapes in the place of control characters."""
  sys.stdout.write(escaped(text) if sys.stdout.isatty() else text)
  sys.stdout.flush()


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
