"""Whatever happens to a file of a checkpoint is noticed, and an older checkpoint is used."""

import random
import re

import pytest

from tests.faults import runs

# What a step cannot be read without; other files matter or not as the store pleases.
NEEDED = ("label/metadata", "arrays/manifest.ocdbt")


def kind_of(path, step):
  """The name of a file in a checkpoint, without what is different in every one."""
  return re.sub(r"[0-9a-f]{32}", "*", str(path.relative_to(step)))


def flip(path, rng):
  data = bytearray(path.read_bytes())
  if data:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def truncate(path, rng):
  data = path.read_bytes()
  path.write_bytes(data[: rng.randrange(len(data))] if data else data)


DAMAGES = {
  "flipped": flip,
  "truncated": truncate,
  "emptied": lambda path, rng: path.write_bytes(b""),
  "deleted": lambda path, rng: path.unlink(),
}


def damage_one(step, how, rng, kind):
  """Damages a file of the `kind`-th kind of a checkpoint; returns its name."""
  files = sorted(path for path in step.rglob("*") if path.is_file())
  kinds = sorted({kind_of(path, step) for path in files})
  kind = kinds[kind % len(kinds)] if isinstance(kind, int) else kind
  path = rng.choice([path for path in files if kind_of(path, step) == kind])
  DAMAGES[how](path, rng)
  return kind


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_noticed_and_an_older_checkpoint_used(case, broken_off, how, seed):
  rng = case.begin(f"checkpoint_file_{how}", seed)
  case.copy(broken_off)
  steps = case.workdir / "checkpoints"
  if seed % 4 == 3:
    for step in (2, 4):
      damage_one(steps / str(step), how, rng, rng.choice(NEEDED))
    refuse(case)
    return
  kind = damage_one(steps / "4", how, random.Random(rng.random()), seed)
  ended = case.recover()
  told = runs.events(case.workdir, "set_aside")
  if not told:  # nothing that is read was in that place
    assert kind not in NEEDED
    assert "going on from step 4" in ended.out
    return
  assert [event["step"] for event in told] == [4]
  assert "checkpoint 4 is damaged and set aside" in ended.out
  assert "going on from step 2" in ended.out
  assert (steps / "4.damaged" / "WHY.txt").read_text().strip() == told[0]["why"]
  assert "checkpoints/4" in told[0]["why"]


def refuse(case):
  """Without an intact checkpoint the run ends with 4 and one line, now and the next time."""
  before = (case.workdir / "metrics.jsonl").read_bytes()
  for words in ("no intact checkpoint", "all were set aside"):
    ended = case.run()
    assert ended.code == 4, ended
    assert len(ended.err.splitlines()) == 1 and words in ended.err, ended.err
  assert (case.workdir / "metrics.jsonl").read_bytes() == before
  assert len(list((case.workdir / "checkpoints").glob("*.damaged"))) == 2
  case.end_as_stated()
