"""Whether this code computes what another commit does, to the last bit: `make same-numbers`.

python -m tests.same_numbers --base=COMMIT [--cases=tiny,quickstart] [--steps=100]
  [--folder=FOLDER] [--rename=OLD=NEW ...]

Each case is trained with both, on this machine, each with caches of its own. Equal must be every
line of metrics.jsonl outside `time`, what was written at prompts, and the digest of the last state;
and when this code goes on from the middle of the other's run, the same again. Half an hour of two
cores; with --folder what is there already of the other commit is not made again.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
EIGHT = {"JAX_NUM_CPU_DEVICES": "8"}
QUICKSTART = "--config=configs/quickstart.py"
SPREAD = [f"--config.{field}" for field in (
  "parallel.data=2", "parallel.expert=2", "parallel.tensor=2", "train.batch_size=8"
)]  # fmt: skip


def tiny(components=""):
  """Returns the argument of `tiny` with these components."""
  return "--config=configs/tiny.py" + (f":{components}" if components else "")


CASES = {
  "tiny": [tiny()],
  "aux_free": [tiny("router=aux_free,dispatch=capacity_spill,experts=latent")],
  "noisy": [tiny("router=noisy,dispatch=einsum,optimizer=lion")],
  "expert_choice": [tiny("router=expert_choice,attention=latent,dispatch=dense")],
  "adaptive": [tiny("router=adaptive,experts=primitives,attention=sinks")],
  "tree": [tiny("router=tree,experts=duo,optimizer=muon,balance=latency_aware")],
  "sinkhorn": [tiny("router=sinkhorn,attention=experts,balance=mutual_information")],
  "mixed": [tiny("balance=heterogeneous,attention=stick_breaking,optimizer=adafactor")],
  "residual": [tiny("router=residual,dispatch=capacity_random,attention=binary_linear")],
  "micro": [tiny(), "--config.train.num_micro=2", "--config.optim.master_dtype=bfloat16"],
  "quickstart": [QUICKSTART],
  "eight": [tiny(), *SPREAD],
}
"""{case: arguments of `launch.train`}; eight are virtual devices: data 2 x expert 2 x tensor 2."""


@contextlib.contextmanager
def worktree(commit, folder):
  """Gives a folder with the files of a commit, whatever a killed run left there, and lets it go."""
  shutil.rmtree(folder, ignore_errors=True)
  subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
  subprocess.run(
    ["git", "worktree", "add", "--quiet", "--force", "--detach", folder, commit],
    cwd=ROOT, check=True,
  )  # fmt: skip
  try:
    yield folder
  finally:
    subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def train(code, case, arguments, workdir, steps, cache):
  """Trains a case with the code of a folder; returns what it said if it failed, else nothing."""
  half = max(steps // 2, 1)
  every = ("train.checkpoint_every", "evaluation.every", "samples.every")
  fields = {"train.num_steps": steps, **dict.fromkeys(every, half)}
  command = [
    sys.executable, "-m", "launch.train", *arguments, f"--workdir={workdir}",
    *(f"--config.{field}={value}" for field, value in fields.items()),
  ]  # fmt: skip
  env = {key: os.environ[key] for key in os.environ if key not in ("XLA_FLAGS", "PYTHONPATH")}
  env |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  env |= EIGHT if case == "eight" else {}
  done = subprocess.run(command, cwd=code, env=env, capture_output=True, text=True)
  return (done.stderr.strip() or done.stdout.strip())[-500:] if done.returncode else ""


def written(workdir):
  """Returns {what: value} of all that a run wrote that does not depend on the clock."""
  found = {}
  for text in (workdir / "metrics.jsonl").read_text().splitlines():
    line = {key: value for key, value in json.loads(text).items() if key != "time"}
    found |= {f"step {line['step']}: {name}": value for name, value in leaves(line)}
  events = [json.loads(text) for text in (workdir / "events.jsonl").read_text().splitlines()]
  last = [event["digest"] for event in events if event["event"] == "done"]
  return {**found, "samples.md": (workdir / "samples.md").read_text(), "digest": last[-1]}


def leaves(tree, path=""):
  """Yields (path, value) of nested dicts and lists."""
  pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in pairs:
    inner = f"{path}/{key}" if path else str(key)
    yield from leaves(value, inner) if isinstance(value, dict | list) else ((inner, value),)


def difference(one, other):
  """Returns the first difference of what two runs wrote, and how many there are; '' for none."""
  names = [name for name in {**one, **other} if one.get(name, "-") != other.get(name, "-")]
  if not names:
    return ""
  first = names[0]
  values = " -> ".join(str(of.get(first, "missing"))[:40] for of in (one, other))
  return f"{first}: {values} ({len(names)} in all)"


def go_on_from_the_middle(base, workdir, steps):
  """Copies a run of `steps` as if it had ended after half of them."""
  shutil.rmtree(workdir, ignore_errors=True)
  shutil.copytree(base, workdir)
  shutil.rmtree(workdir / "checkpoints" / str(steps))


def compare(case, renames, folder, base, steps):
  """Returns what differs of a case, straight and resumed: '' where nothing does."""
  old, new, resumed = (folder / side / case for side in ("base", "head", "resumed"))
  arguments = CASES[case]
  if not finished(old, steps):
    shutil.rmtree(old, ignore_errors=True)
    said = train(base, case, arguments, old, steps, folder / "cache_base")
    if said:
      return f"base failed: {said}", ""
  for before, after in renames:
    arguments = [re.sub(rf"\b{re.escape(before)}\b", after, one) for one in arguments]
  shutil.rmtree(new, ignore_errors=True)
  go_on_from_the_middle(old, resumed, steps)
  found = []
  for workdir in (new, resumed):
    said = train(ROOT, case, arguments, workdir, steps, folder / "cache_head")
    found.append(f"failed: {said}" if said else difference(written(old), written(workdir)))
  return tuple(found)


def finished(workdir, steps):
  """Returns whether a run of so many steps is there already."""
  return (workdir / "checkpoints" / str(steps)).exists()


def commit_of(name):
  """Returns the commit that a name stands for."""
  command = ["git", "rev-parse", "--verify", "--short=12", f"{name}^{{commit}}"]
  return subprocess.run(
    command, cwd=ROOT, check=True, capture_output=True, text=True
  ).stdout.strip()


def main():
  """Compares, prints a table, and returns 1 where anything differs."""
  parser = argparse.ArgumentParser(prog="python -m tests.same_numbers")
  parser.add_argument("--base", required=True, help="The commit to compare with.")
  parser.add_argument("--cases", default=",".join(CASES), help="Some of: %(default)s.")
  parser.add_argument("--steps", type=int, default=100, help="How long each run is.")
  parser.add_argument("--folder", help="Where runs are kept; what is there of base is not redone.")
  parser.add_argument(
    "--rename", action="append", default=[], help="OLD=NEW: what of a command line this code calls "
    "otherwise.",
  )
  asked = parser.parse_args()
  renames = [rename.split("=", 1) for rename in asked.rename]
  same = True
  with contextlib.ExitStack() as stack:
    kept = asked.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="same-numbers-"))
    commit = commit_of(asked.base)
    folder = pathlib.Path(kept).absolute() / f"{commit}-{asked.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    base = stack.enter_context(worktree(commit, folder / "code"))
    print(f"{'case':14} {'straight':8} {'resumed':8} first difference from {commit}", flush=True)
    for case in asked.cases.split(","):
      found = compare(case, renames, folder, base, asked.steps)
      same = same and not any(found)
      shown = ["differs" if one else "same" for one in found]
      what = next((one for one in found if one), "")
      print(f"{case:14} {shown[0]:8} {shown[1]:8} {what}", flush=True)
  return 0 if same else 1


if __name__ == "__main__":
  sys.exit(main())
