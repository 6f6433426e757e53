"""Makes a run of a public checkpoint, or a public checkpoint of a run.

jaxmoe convert --from_checkpoint=FOLDER --workdir=runs/x [--text=FOLDER] [--eod=TOKEN]
  [--weights_only] [--rules=FILE.json]
  [--file_dtype=float32] [--compute_dtype=float32] [--config=RECIPE] [--config.FIELD=VALUE]
jaxmoe convert --workdir=runs/x --to_hf=FOLDER [--file_dtype=bfloat16] [--shard_gb=5]

FOLDER has config.json and tokenizer.json, as transformers writes them, and *.safetensors,
pytorch_model.bin or what torch.distributed.checkpoint or DeepSpeed's ZeRO wrote (of which nothing
is run). The new run is at step 0, or where DeepSpeed or torch.distributed.checkpoint kept Adam's
moments, with these at their step, unless --weights_only is given. --rules says how the files are
put together where each is what one device wrote (docs/public_models.md). --from_hf is another name
of --from_checkpoint. jaxmoe evaluate, generate, score, surgery and train take it as any other.
--text is what it is scored and trained on (the standard library where none is given); --config is a
recipe for all but model and tokenizer. Weights are read and written one at a time; the tokenizer's
files go along. Code is never run.

--file_dtype is that of the weights that are written, each its own where it is not given: of a run
that has not been trained all come back bit for bit, and what was trained is rounded to what it was
in the checkpoint it came from. --compute_dtype is what the run computes in whatever its file holds:
bfloat16 of a checkpoint in bfloat16, else float32.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from jaxmoe.commands.process import command_line, jax_settings, run_flags
from jaxmoe.commands.process.command_line import follow_up, say
from jaxmoe.conversion import hf_export, hf_import
from jaxmoe.core.errors import InputError
from jaxmoe.data.sources.auto import source_at
from jaxmoe.runs.recipe_loading import PREFIX, load_recipe, parse_changes

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run.", flag_values=FLAGS)
flags.DEFINE_string(
  "from_checkpoint", None, "A checkpoint to make the run of.", flag_values=FLAGS
)
flags.DEFINE_string("from_hf", None, "Other name of --from_checkpoint.", flag_values=FLAGS)
flags.DEFINE_string("rules", None, "How files of devices are put together.", flag_values=FLAGS)
flags.DEFINE_bool("weights_only", False, "Leave Adam's moments.", flag_values=FLAGS)
flags.DEFINE_string("to_hf", None, "A folder to write; must not exist.", flag_values=FLAGS)
flags.DEFINE_enum(
  "file_dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Of weights that are written; their own if not given.",
  flag_values=FLAGS,
)
flags.DEFINE_enum(
  "compute_dtype", None, ["float32", "bfloat16"], "What the run computes in.", flag_values=FLAGS
)
flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Older name of --file_dtype, with --to_hf.",
  flag_values=FLAGS,
)
flags.DEFINE_string("text", None, "Text files to score and train on.", flag_values=FLAGS)
flags.DEFINE_string("eod", None, "The token that ends a document.", flag_values=FLAGS)
flags.DEFINE_string("config", None, "A recipe for all but the model.", flag_values=FLAGS)
flags.DEFINE_float("shard_gb", 5.0, "The most of one file, in 10^9 bytes.", flag_values=FLAGS)

IN, OUT = ("text", "eod", "config", "compute_dtype", "weights_only", "rules"), ("shard_gb",)


def main(overrides: list[str]) -> int:
  """Runs the command; returns the exit code."""
  given = [path for path in (FLAGS.from_checkpoint, FLAGS.from_hf) if path is not None]
  if len(given) == 2:
    raise InputError("--from_hf is another name of --from_checkpoint; give one of the two")
  if bool(given) == (FLAGS.to_hf is not None):
    raise InputError("give one of --from_checkpoint=FOLDER and --to_hf=FOLDER")
  source = given[0] if given else ""
  stray = [name for name in (OUT if source else IN) if FLAGS[name].present]
  if stray or (overrides and FLAGS.to_hf):
    name = stray[0] if stray else overrides[0].lstrip("-")
    raise InputError(f"--{name} goes with the other direction; leave it out")
  if FLAGS.dtype and (source or FLAGS.file_dtype):
    raise InputError(
      "--dtype: of what? give --file_dtype for the weights that are written, --compute_dtype for "
      "what the run computes in"
    )
  file_dtype = FLAGS.file_dtype or FLAGS.dtype
  workdir = run_flags.need_workdir(FLAGS.workdir)
  if FLAGS.to_hf:
    if FLAGS.shard_gb <= 0:
      raise InputError(f"--shard_gb={FLAGS.shard_gb} must be above 0")
    jax_settings.set_up_jax(keep_memory=False)
    limit_bytes = int(FLAGS.shard_gb * 1e9)
    hf_export.to_hf(workdir, FLAGS.to_hf, file_dtype, limit_bytes, warn=run_flags.complain)
    return 0
  if file_dtype == "float16":
    raise InputError(
      "--file_dtype=float16 is for --to_hf; parameters of a run are float32 or bfloat16"
    )
  jax_settings.set_up_jax(keep_memory=False)
  hf_import.from_hf(source, workdir, options(overrides, file_dtype))
  here = f"--workdir={workdir.path}"
  say(f"  score it:    {follow_up('evaluate', here)}")
  say(f"  write text:  {follow_up('generate', here, '--prompt=The ')}")
  say(f"  train it:    {follow_up('train', f'--config={workdir.config}', here)}")
  return 0


def options(overrides: list[str], file_dtype: Any) -> hf_import.ImportOptions:
  """Returns what the flags say of the run that is made."""
  with run_flags.named("text"):
    source = source_at(FLAGS.text) if FLAGS.text else None
  base = load_recipe(FLAGS.config, []) if FLAGS.config else None
  changes = tuple(parse_changes(overrides))
  return hf_import.ImportOptions(
    source, FLAGS.eod, base, changes, FLAGS.compute_dtype, file_dtype, FLAGS.weights_only,
    FLAGS.rules,
  )


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__, takes=(PREFIX,))


if __name__ == "__main__":
  run()
