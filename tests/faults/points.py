"""Where a run can be hit: places of the product by their phase, and draws from them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Place:
  """A function of the product, how often a run calls it, and how long after it still counts."""

  target: str
  calls: int = 1
  within_s: float = 0.0

  def draw(self, rng):
    """Returns a moment at or after one of the calls."""
    at = {"target": self.target, "call": rng.randint(1, self.calls)}
    at["when"] = rng.choice(("before", "after"))
    if self.within_s and rng.random() < 0.6:
      at["delay_s"] = round(rng.uniform(0.0, self.within_s), 5)
    return at


@dataclasses.dataclass(frozen=True)
class File:
  """A file operation on a path of a pattern; the moment is just before it."""

  event: str
  like: str
  calls: int = 1

  def draw(self, rng):
    """Returns one of the calls."""
    return {"file": self.event, "like": self.like, "call": rng.randint(1, self.calls)}


TRAINER = "jaxmoe.train.trainer"
STORE = "jaxmoe.checkpoint.orbax_store:OrbaxStore"
SAVER, RUN_LOG = "jaxmoe.train.saver:Saver", "jaxmoe.train.run_log:RunLog"
POINTS = {
  "compile": (
    Place(f"{TRAINER}:Trainer.compiled_step", within_s=0.9),
    Place("jax._src.compiler:compile_or_get_cached", calls=20),
  ),
  "step": (
    Place(f"{RUN_LOG}.step", calls=6, within_s=0.004),
    Place("jaxmoe.train.step_line:summarize", calls=6, within_s=0.002),
  ),
  "save": (
    Place(f"{STORE}.write", calls=3),
    Place(f"{STORE}.write", calls=3, within_s=0.06),
    File("os.rename", "*/checkpoints/*", calls=3),
    Place(f"{SAVER}.finish", within_s=0.03),
    File("os.remove", "*/checkpoints/2/*", calls=5),
    Place(f"{RUN_LOG}.sync", calls=3),
  ),
  "evaluation": (
    Place("jaxmoe.train.evaluate:score_rows", calls=8, within_s=0.01),
    Place("jaxmoe.train.hooks:EvaluationHook.__call__", calls=2),
  ),
  "samples": (
    Place("jaxmoe.train.hooks:generate", calls=2, within_s=0.01),
    Place("jaxmoe.train.hooks:SamplesHook.__call__", calls=2),
    File("open", "*/samples.md", calls=3),
  ),
  "data": (
    Place("jaxmoe.data.corpus:validate_source", calls=4, within_s=0.01),
    Place("jaxmoe.data.corpus:Corpus.stream", within_s=0.05),
    Place("jaxmoe.data.stream:BatchStream.__next__", calls=6, within_s=0.002),
  ),
  "rollback": (
    Place(f"{TRAINER}:Trainer.rollback", within_s=0.1),
    Place("jaxmoe.train.rollback:Rollback.read"),
    Place(f"{TRAINER}:forget"),
    Place(f"{STORE}.set_aside"),
  ),
  "restore": (
    Place(f"{STORE}.read", within_s=0.1),
    Place("jaxmoe.checkpoint.orbax_store:check_digests"),
    Place("jaxmoe.data.stream:BatchStream.restore"),
    Place(f"{RUN_LOG}.resume"),
    Place("jaxmoe.train.hooks:cut_samples"),
  ),
}


def draw(phase, rng):
  """Returns a moment of a phase: 'at' of a plant."""
  return rng.choice(POINTS[phase]).draw(rng)


def before(target, call=1):
  """Returns the moment before a call."""
  return {"target": target, "call": call, "when": "before"}
