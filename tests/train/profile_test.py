import re

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import one_device
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.moe.dispatch import Capacity, Dropless
from jaxmoe.optim import Optim, make_optimizer, make_schedule
from jaxmoe.train import profile
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.profile import Profiler, parse_steps
from jaxmoe.train.step import TrainStep
from jaxmoe.train.train_state import StateSpec

BLOCK = ("attention", "mlp", "moe/route", "moe/move", "moe/experts", "moe/combine", "moe/shared")
BACKWARD = (*BLOCK, "embed", "final_norm", "loss")
FORWARD = (*BACKWARD, "moe/plan", "moe/sums", "balance")
OUTSIDE = ("count_choices", "optimizer")


@pytest.fixture
def _names_are_fresh():
  """A program from the cache has the names of the code that compiled it."""
  jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
  yield
  jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


def dense_then(block):
  dense = BlockConfig(
    SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=4), MLPConfig(mlp_dim=8)
  )
  return (LayerGroup((dense, block), repeats=2),)


@pytest.fixture
def compiled(decoder_of, batch_of, _names_are_fresh):
  """Returns a function from fields of MoEConfig to the compiled step, a state and a batch."""

  def make(**fields):
    decoder = decoder_of(stack=dense_then, shared_mlp_dim=8, **fields)
    optim = Optim()
    transform = make_optimizer(optim, 1000, decoder.parameter_names, decoder.dims)
    step = TrainStep(make_gradients(decoder, 2), transform, make_schedule(optim, 1000), 0)
    state = StateSpec(decoder, transform, one_device(), 4).init(0)
    batch = jax.tree.map(jnp.asarray, batch_of([[8], [5, 3], [7], [8]], 8))
    return jax.jit(step).lower(state, batch).compile(), state, batch

  return make


def has(names, scope, *around):
  """Whether a name holds the scope's parts in order, each whole, and what is around it."""
  parts = scope.split("/")
  for name in names:
    words = re.findall(r"\w+", name)
    places = [words.index(part) for part in parts if part in words]
    if len(places) == len(parts) and places == sorted(places) and all(a in name for a in around):
      return True
  return False


@pytest.mark.parametrize(
  "dispatch",
  [
    pytest.param(Dropless(), id="fused"),
    pytest.param(Capacity(), id="capacity", marks=pytest.mark.slow),
  ],
)
def test_every_phase_of_the_compiled_step_has_its_name_forward_and_backward(compiled, dispatch):
  step, _, _ = compiled(dispatch=dispatch)
  names = set(re.findall(r'op_name="([^"]*)"', step.as_text()))
  backward = {name for name in names if "transpose(" in name}
  assert [scope for scope in FORWARD if not has(names - backward, scope, "jvp(")] == []
  assert [scope for scope in BACKWARD if not has(backward, scope)] == []
  assert [scope for scope in OUTSIDE if not has(names - backward, scope)] == []


def test_names_of_another_phase_are_not_taken_for_it():
  names = {"jit(step)/jvp()/moe/experts_of/dot", "jit(step)/experts/moe/dot"}
  assert not has(names, "moe/experts")
  assert has(names, "moe")
  assert not has(names, "moe", "transpose(")


def test_a_profile_of_a_real_step_holds_a_trace_with_the_names(compiled, tmp_path):
  step, state, batch = compiled(dispatch=Dropless())
  said = []
  profiler = Profiler(2, 3, tmp_path / "profile", said.append)
  for n in range(1, 6):
    profiler.before(n)
    state, metrics = step(state, batch)
    profiler.after(n, metrics)
  profiler.close()
  assert said == [f"profile of steps 2 to 3 in {tmp_path / 'profile'}"]
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  content = trace.read_bytes()
  scopes = {part for scope in (*FORWARD, *OUTSIDE) for part in scope.split("/")}
  assert [scope for scope in sorted(scopes) if scope.encode() not in content] == []
  assert content.count(b"train_step") >= 1


@pytest.fixture
def calls(monkeypatch):
  """Returns a list of what the profiler did to JAX."""
  done = []

  class Mark:
    def __init__(self, name, step_num):
      self.step = step_num

    def __enter__(self):
      done.append(f"enter {self.step}")

    def __exit__(self, *error):
      done.append(f"leave {self.step}")

  monkeypatch.setattr(profile.jax.profiler, "StepTraceAnnotation", Mark)
  monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda *a, **k: done.append("start"))
  monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: done.append("stop"))
  monkeypatch.setattr(profile.jax, "block_until_ready", lambda x: done.append(f"wait {x}"))
  return done


def drive(profiler, first, last):
  for step in range(first, last + 1):
    profiler.before(step)
    profiler.after(step, step)
  profiler.close()


INSIDE = ["start", "enter 3", "leave 3", "enter 4", "wait 4", "leave 4", "stop"]


@pytest.mark.parametrize(
  "first, last, expected, told",
  [
    (1, 9, ["wait 2", *INSIDE], "steps 3 to 4 in"),
    (3, 9, INSIDE, "steps 3 to 4 in"),
    (4, 9, ["start", "enter 4", "wait 4", "leave 4", "stop"], "steps 4 to 4 in"),
    (5, 9, [], "goes on at step 5, after step 4"),
    (1, 3, ["wait 2", "start", "enter 3", "leave 3", "stop"], "steps 3 to the run's end"),
    (1, 2, ["wait 2"], None),
    (1, 1, [], None),
  ],
)
def test_a_trace_holds_the_steps_of_the_range_the_run_makes(calls, first, last, expected, told):
  said = []
  drive(Profiler(3, 4, "folder", said.append), first, last)
  assert calls == expected
  assert len(said) == (told is not None)
  assert all(told in line for line in said)


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_stops_no_run(calls, monkeypatch, broken):
  def fail(*arguments, **options):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(profile.jax.profiler, broken, fail)
  said = []
  drive(Profiler(3, 4, "folder", said.append), 1, 9)
  assert "no profile: OSError: [Errno 28] No space left on device" in said
  assert calls.count("start") == (broken == "stop_trace")


def test_the_range_is_read_as_first_and_last_step():
  assert parse_steps("10:12", 100) == (10, 12)
  assert parse_steps("1:1", 1) == (1, 1)
  assert parse_steps("1:100", 1000) == (1, 100)


@pytest.mark.parametrize(
  "text, words",
  [
    ("", "FIRST:LAST"),
    ("5", "FIRST:LAST"),
    ("a:b", "FIRST:LAST"),
    ("-1:4", "FIRST:LAST"),
    ("1:2:3", "FIRST:LAST"),
    ("0:4", "1 <= FIRST <= LAST <= 500"),
    ("9:8", "1 <= FIRST <= LAST <= 500"),
    ("400:501", "1 <= FIRST <= LAST <= 500"),
    ("1:101", "at most 100"),
    ("1" * 5000 + ":2", "FIRST:LAST"),
  ],
)
def test_a_range_that_cannot_be_profiled_is_refused(text, words):
  with pytest.raises(InputError, match=re.escape(words)):
    parse_steps(text, 500)
