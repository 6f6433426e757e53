"""What files of earlier runs call things: names of arrays, draws, metrics and events stay.

`data_names.json` lists those of before, of `tiny` with each component of every family, one change
at a time. Code may call things as it likes; these names are data. Arrays are read by them, a draw
depends on the name it is made by, and tools read metrics and events. A component that is new adds
lines (`python -m tests.commands.data_names_test` writes the file); a line that goes or changes
breaks runs that are there.
"""

import ast
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import get_config
from jaxmoe.core import first_values, rng
from jaxmoe.core.layout import one_device
from jaxmoe.core.rng import Keys, name_hash
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.block import ATTENTION, BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.balance import BALANCE, LoadBalance
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.optim import OPTIMIZERS, Cosine, Muon, OnlineFairness, Optim
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.step_summary import summarize
from jaxmoe.train.train_state import StateSpec

ROOT = pathlib.Path(__file__).parents[2]
LIST = pathlib.Path(__file__).parent / "data_names.json"
FAMILIES = {
  "router": ROUTERS,
  "experts": EXPERTS,
  "dispatch": DISPATCHERS,
  "balance": BALANCE,
  "attention": ATTENTION,
  "optimizer": OPTIMIZERS,
}


def with_tree():
  """Returns `tiny` with trees that treat domains alike, and muon over bfloat16 masters."""
  made = get_config(router="tree")
  fairness = OnlineFairness(weight=0.1)
  optim = Optim(Muon(), Cosine(warmup_steps=2), fairness=fairness, master_dtype="bfloat16")
  return dataclasses.replace(made, optim=optim)


def with_blocks(blocks):
  """Returns `tiny` with these blocks, one after the other."""
  model = TransformerConfig(dim=32, stack=tuple(LayerGroup((block,)) for block in blocks))
  return dataclasses.replace(get_config(), model=model)


def moe(router="topk", **fields):
  """Returns a layer as `tiny` has it."""
  rule = ROUTERS[router][1]
  return MoEConfig(num_experts=4, num_active=rule.fixed_active or 2, router=rule, **fields)


def drawing():
  """Returns `tiny` with a block for whatever draws its parameters in a way of its own."""
  layers = [moe(experts=experts) for _, experts in EXPERTS.values()]
  layers += [moe(name) for name in ("cosine", "residual", "tree", "noisy", "quantile", "adaptive")]
  layers += [MoEConfig(num_experts=4, num_active=2, shared_mlp_dim=16, shared_gate=True)]
  attention = itertools.cycle(attention for _, attention in ATTENTION.values())
  return with_blocks(
    [*map(BlockConfig, attention, layers), BlockConfig(ATTENTION["softmax"][1], MLPConfig(16))]
  )


def choosing():
  """Returns `tiny` with a block for each router and each dispatcher."""
  layers = [moe(router) for router in ROUTERS]
  layers += [moe(dispatch=dispatch) for _, dispatch in DISPATCHERS.values()]
  return with_blocks([BlockConfig(ATTENTION["softmax"][1], layer) for layer in layers])


def measured():
  """Returns `tiny` with a block for whatever writes metrics in a way of its own."""
  term = {name: term for name, (_, term) in BALANCE.items()}
  of_null, of_mixed, of_relu = (
    term.pop(name) for name in ("null_averaged", "heterogeneous", "sparsity")
  )
  scopes = ("sequence", "micro", "data_parallel", "global_running")
  scoped = (LoadBalance(scope=scope) for scope in scopes)
  layers = [
    moe(experts=EXPERTS["duo"][1], balance=(*term.values(), *scoped)),
    moe(experts=EXPERTS["null"][1], balance=(of_null,)),
    moe(experts=EXPERTS["zero_copy_constant"][1], balance=(of_mixed,)),
    moe("relu", dispatch=DISPATCHERS["capacity"][1], balance=(of_relu,)),
  ]
  attention = [ATTENTION["experts"][1], *[ATTENTION["softmax"][1]] * 3]
  return with_blocks([*map(BlockConfig, attention, layers)])


def cases():
  """Returns {case: function that makes its recipe}."""
  made = {
    f"{family}={name}": functools.partial(get_config, **{family: name})
    for family, members in FAMILIES.items()
    for name in members
  }
  return {"tiny": get_config, **made, "tree": with_tree, "drawing": drawing}


def spec_of(experiment):
  """Returns the decoder of a recipe and the spec of its state."""
  decoder = experiment.decoder()
  masters = experiment.masters(decoder)
  return decoder, StateSpec(decoder, experiment.transform(decoder), one_device(), 8, masters)


def of_any_layer(name):
  """Returns a name in which the number of a layer is a star."""
  return re.sub(r"(layers|attention)/\d+", r"\1/*", name)


def arrays_of(experiment):
  """Returns the names of the arrays of a checkpoint, with dtypes and shapes."""
  like = spec_of(experiment)[1].abstract()
  return sorted(
    {f"{of_any_layer(name)} {leaf.dtype.name}{list(leaf.shape)}" for name, leaf in like.items()}
  )


@contextlib.contextmanager
def recorded():
  """Gives the set of names that keys are drawn by meanwhile, while programs are traced anew."""
  drawn = set()

  def hashed(path):
    drawn.add(path)
    return name_hash(path)

  jax.clear_caches()
  with pytest.MonkeyPatch.context() as patch:
    for module in (first_values, rng):
      patch.setattr(module, "name_hash", hashed)
    yield drawn


def initial_draws(experiment):
  """Returns the names that initial parameters are drawn by."""
  with recorded() as drawn:
    decoder = experiment.decoder()
    jax.eval_shape(lambda: decoder.init(Keys.from_seed(0)))
  return sorted(drawn)


def forward_draws(experiment):
  """Returns the names that a forward pass draws by."""
  decoder = experiment.decoder()
  batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in
           abstract_batch(experiment, one_device()).items()}  # fmt: skip

  def forward(params):
    return decoder.hidden(params, Tokens.of_batch(batch), keys=Keys.from_seed(0))[0]

  with recorded() as drawn:
    jax.eval_shape(forward, decoder.shapes)
  return sorted(drawn)


def paths(tree):
  """Yields the paths of nested dicts; a list is a leaf."""
  for key, value in tree.items():
    yield from (f"{key}/{path}" for path in paths(value)) if isinstance(value, dict) else (key,)


def metrics_of(experiment):
  """Returns the keys of a line that the step itself makes."""
  decoder, spec = spec_of(experiment)
  like = abstract_state(spec), abstract_batch(experiment, one_device())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.stages.Traced, "lower", lambda traced: traced)  # which takes a second
    metrics = lower_step(experiment, decoder, spec, one_device(), *like).out_info[1]
  ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), metrics)
  return sorted({of_any_layer(path) for path in paths(summarize(ones, decoder.layer_groups))})


def initial_values(experiment):
  """Returns what of the initial parameters no processor rounds away, by name.

  Entries are summed with weights that change from one to the next, so that their order counts.
  """
  _, spec = spec_of(experiment)
  arrays = spec.to_arrays(spec.init(0))
  found = {}
  for name, leaf in arrays.items():
    if name.startswith("params/"):
      flat = np.asarray(leaf, np.float64).ravel()
      found[name] = float(f"{flat @ np.cos(np.arange(flat.size)):.4g}")
  return found


def words_of_events(known):
  """Returns {event: which of its known keys stand in the packages that write it}."""
  found, words = {name: set() for name in known}, collections.defaultdict(set)
  writers = collections.defaultdict(set)
  for path in [*ROOT.glob("jaxmoe/**/*.py"), *ROOT.glob("launch/**/*.py")]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    words[path.parent] |= {node.arg for node in nodes if isinstance(node, ast.keyword)}
    words[path.parent] |= {node.value for node in nodes if isinstance(node, ast.Constant)}
    for call in (node for node in nodes if isinstance(node, ast.Call) and node.args):
      texts = (text.value for text in ast.walk(call.args[0]) if isinstance(text, ast.Constant))
      for name in known.keys() & {text for text in texts if isinstance(text, str)}:
        writers[name].add(path.parent)
  for name, folders in writers.items():
    there = set().union(*(words[folder] for folder in folders))
    found[name] = there & {*known[name]}
  return {name: sorted(words) for name, words in found.items()}


def files_of(workdir, known):
  """Returns the keys of all lines of metrics and of each kind of event.

  Of `seconds` a line has those categories alone whose seconds are not 0.
  """
  lines, events = (
    [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    for name in ("metrics.jsonl", "events.jsonl")
  )
  for line in lines + events:
    if "seconds" in line["time"]:
      assert line["time"]["seconds"].keys() <= {*known["categories"]}
      line["time"]["seconds"] = None
  kinds = sorted({event["event"] for event in events})
  return {
    "metrics.jsonl": sorted({of_any_layer(path) for line in lines for path in paths(line)}),
    "events.jsonl": {
      kind: sorted({path for event in events if event["event"] == kind for path in paths(event)})
      for kind in kinds
    },
  }


def changes(known, names):
  """Returns names as what is more and less than in those known."""
  return {"+": sorted({*names} - {*known}), "-": sorted({*known} - {*names})}


def all_arrays():
  """Returns the names of arrays of `tiny`, and of each other case what differs from them."""
  tiny = arrays_of(get_config())
  return {name: changes([] if name == "tiny" else tiny, arrays_of(make()))
          for name, make in cases().items()}  # fmt: skip


MADE = {
  "arrays": all_arrays,
  "draws of parameters": lambda: initial_draws(drawing()),
  "draws of a forward pass": lambda: forward_draws(choosing()),
  "metrics of a step": lambda: metrics_of(measured()),
  "initial values": lambda: initial_values(get_config()),
}


@pytest.fixture(scope="module")
def known():
  return json.loads(LIST.read_text())


@pytest.mark.parametrize("what", MADE)
def test_what_files_call_things_is_what_it_was(what, known):
  assert MADE[what]() == known[what]


def test_a_run_writes_the_lines_and_events_of_before(trained, known):
  assert files_of(trained, known) == {
    name: known[name] for name in ("metrics.jsonl", "events.jsonl")
  }


def test_events_that_runs_seldom_write_are_called_what_they_were(known):
  assert words_of_events(known["other events"]) == known["other events"]


def written(known):
  """Returns the text of the list: a line for each case of each kind of name."""
  kinds = []
  for kind, names in known.items():
    pairs = names.items() if isinstance(names, dict) else [("", names)]
    lines = [f"{json.dumps(case)}: {json.dumps(of)}" if case else json.dumps(of)
             for case, of in pairs]  # fmt: skip
    body = ",\n".join(lines)
    kinds.append(f"{json.dumps(kind)}: " + (f"{{\n{body}\n}}" if isinstance(names, dict) else body))
  return "{\n" + ",\n".join(kinds) + "\n}\n"


if __name__ == "__main__":
  was = json.loads(LIST.read_text())
  LIST.write_text(written({**was, **{what: make() for what, make in MADE.items()}}))
