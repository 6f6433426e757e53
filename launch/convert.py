"""Makes a run of a public checkpoint, or a public checkpoint of a run.

python -m launch.convert --from_hf=FOLDER --workdir=runs/x [--text=FOLDER] [--dtype=float32]
  [--eod=TOKEN] [--config=RECIPE] [--config.FIELD=VALUE]
python -m launch.convert --workdir=runs/x --to_hf=FOLDER [--dtype=bfloat16] [--shard_gb=5]

FOLDER has config.json, *.safetensors and tokenizer.json, as transformers writes them. The new run
is at step 0: launch.evaluate, generate, score, surgery and train take it as any other. --text is
what it is scored and trained on (the standard library where none is given); --config is a recipe
for all but model and tokenizer. Weights are read and written one at a time, bit for bit unless
--dtype asks for another; the tokenizer's files go along. Pickles are never opened, code never run.
"""

from __future__ import annotations

from absl import flags

from jaxmoe.core.errors import InputError
from launch import cli, export, intake
from launch.recipes import PREFIX

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run.", flag_values=FLAGS)
flags.DEFINE_string("from_hf", None, "A checkpoint to make the run of.", flag_values=FLAGS)
flags.DEFINE_string("to_hf", None, "A folder to write; must not exist.", flag_values=FLAGS)
flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"], "Of what is written; as it is if not given.",
  flag_values=FLAGS,
)
flags.DEFINE_string("text", None, "Text files to score and train on.", flag_values=FLAGS)
flags.DEFINE_string("eod", None, "The token that ends a document.", flag_values=FLAGS)
flags.DEFINE_string("config", None, "A recipe for all but the model.", flag_values=FLAGS)
flags.DEFINE_float("shard_gb", 5.0, "The most of one file, in 10^9 bytes.", flag_values=FLAGS)

IN, OUT = ("text", "eod", "config"), ("shard_gb",)


def main(overrides: list[str]) -> int:
  """Runs the command; returns the exit code."""
  if (FLAGS.from_hf is None) == (FLAGS.to_hf is None):
    raise InputError("give one of --from_hf=FOLDER and --to_hf=FOLDER")
  stray = [name for name in (OUT if FLAGS.from_hf else IN) if FLAGS[name].present]
  if stray or (overrides and FLAGS.to_hf):
    name = stray[0] if stray else overrides[0].lstrip("-")
    raise InputError(f"--{name} goes with the other direction; leave it out")
  workdir = cli.need_workdir(FLAGS.workdir)
  if FLAGS.to_hf:
    if FLAGS.shard_gb <= 0:
      raise InputError(f"--shard_gb={FLAGS.shard_gb} must be above 0")
    export.to_hf(workdir, FLAGS.to_hf, FLAGS.dtype, int(FLAGS.shard_gb * 1e9))
    return 0
  if FLAGS.dtype == "float16":
    raise InputError("--dtype=float16 is for --to_hf; parameters of a run are float32 or bfloat16")
  wishes = intake.Wishes(FLAGS.text, FLAGS.eod, FLAGS.config, tuple(overrides))
  intake.from_hf(FLAGS.from_hf, workdir, FLAGS.dtype, wishes)
  print(f"  score it:    python -m launch.evaluate --workdir={workdir.path}")
  print(f"  write text:  python -m launch.generate --workdir={workdir.path} --prompt='The '")
  print(f"  train it:    python -m launch.train --config={workdir.path}/config.json "
        f"--workdir={workdir.path}")
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS, __doc__, takes=(PREFIX,))
