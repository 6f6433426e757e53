"""`launch.convert`: public checkpoints become runs and back, bit for bit or not at all."""

import itertools
import json
import pathlib
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers

from jaxmoe.checkpoint import open_store
from jaxmoe.checkpoint.digest import digest
from jaxmoe.commands.process import run_flags
from jaxmoe.core.layout import one_device
from jaxmoe.data.tokenizers import load_tokenizer
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.checkpoint import open_checkpoint
from jaxmoe.train.hooks import encode_prompt
from jaxmoe.train.train_state import StateSpec, read_state
from jaxmoe.train.workdir import Workdir
from tests.models.pretrained.checkpoint import bits, tensors_of, write_tokenizer
from tests.models.pretrained.golden import FOLDER as GOLDEN

ONE_LINE = "error: "


# Every kind of leaf; all families' weights there and back, without files, are in tests/models.
SOME = {("deepseek_v3", "mixed"), ("gpt_oss", "float16")}
EVERY = [
  pytest.param(*pair, marks=[] if pair in SOME else pytest.mark.slow)
  for pair in itertools.product(FAMILIES, ["float32", "bfloat16", "float16", "mixed"])
]


@pytest.mark.parametrize(("model_type", "dtype"), EVERY)
def test_there_and_back_is_bit_equal(convert, checkpoint, tmp_path, model_type, dtype):
  there = checkpoint(model_type, dtype)
  run, back = tmp_path / "run", tmp_path / "back"
  convert(f"--from_hf={there}", f"--workdir={run}")
  result = convert(f"--workdir={run}", f"--to_hf={back}")
  assert bits(tensors_of(back)) == bits(tensors_of(there)) and "rounded" not in result.out
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (back / name).read_bytes() == (there / name).read_bytes()
  models = [open_checkpoint(FAMILIES, folder).model for folder in (there, back)]
  assert models[0] == models[1]
  before, after = (json.loads((folder / "config.json").read_text()) for folder in (there, back))
  assert {key: after[key] for key in before} == before
  (tmp_path / "usual").touch()
  written = [path for folder in (run, back) for path in folder.rglob("*") if path.is_file()]
  assert {path.stat().st_mode for path in written} == {(tmp_path / "usual").stat().st_mode}


def test_shards_have_an_index_and_the_same_bytes_every_time(convert, checkpoint, tmp_path):
  there, run = checkpoint("deepseek_v3"), tmp_path / "run"
  convert(f"--from_hf={there}", f"--workdir={run}")
  folders = [tmp_path / name for name in ("one", "two")]
  for folder in folders:
    convert(f"--workdir={run}", f"--to_hf={folder}", "--shard_gb=0.00001")
  files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
  assert files[0] == files[1]
  shards = sorted(folders[0].glob("model-*.safetensors"))
  assert len(shards) > 2 and all(path.stat().st_size < 20_000 for path in shards)
  index = json.loads((folders[0] / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_of(there).values())
  assert bits(tensors_of(folders[0])) == bits(tensors_of(there))
  convert(f"--from_hf={folders[0]}", f"--workdir={tmp_path / 'again'}")


def test_a_converted_run_is_scored_as_transformers_does(convert, checkpoint, here, tmp_path):
  run = tmp_path / "run"
  convert(f"--from_hf={checkpoint('mixtral')}", f"--workdir={run}")
  expected = safetensors.numpy.load_file(GOLDEN / "mixtral" / "expected.safetensors")
  np.save(tmp_path / "ids.npy", expected["ids"])
  flags = (f"--ids={tmp_path / 'ids.npy'}", f"--out={tmp_path / 'scores.npz'}", "--logits")
  assert here("score", f"--workdir={run}", *flags).code == 0
  logits = np.load(tmp_path / "scores.npz")["logits"]
  np.testing.assert_allclose(logits, expected["logits"], atol=2e-4, rtol=1e-4)


def test_a_converted_run_is_scored_on_any_text_and_on_questions(convert, checkpoint, here, text,
                                                                tmp_path):  # fmt: skip
  run = tmp_path / "run"
  convert(f"--from_hf={checkpoint('llama')}", f"--workdir={run}")
  (text / "sub").mkdir()
  more = {"f.py": b"y = 1\n", "sub/README": b"words", "logo.png": b"\0", "sub/__init__.py": b""}
  for name, raw in more.items():
    (text / name).write_bytes(raw)
  result = here("evaluate", f"--workdir={run}", f"--text={text}", "--batch_size=2")
  assert result.code == 0, result
  size = sum(path.stat().st_size for path in text.rglob("*.txt")) + 11
  assert f"scoring {size:,} bytes" in result.out
  assert "left out: 2 files without text, such as logo.png" in result.out
  scores = json.loads((run / "eval_text.json").read_text())
  assert scores["without_text"] == ["logo.png", "sub/__init__.py"]
  nats = scores["bits_per_byte"] * np.log(2)
  assert scores["domains"].keys() == {"text"} and 1 < nats < np.log(61) + 3
  line = {"question": "def f(x):", "choices": ["return x", "x"], "answer": 0}
  (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n")
  result = here("evaluate", f"--workdir={run}", f"--choices={tmp_path / 'questions.jsonl'}")
  assert result.code == 0, result
  found = json.loads((run / "eval_choices.json").read_text())
  assert (found["questions"], found["chance"]) == (1, 0.5)
  assert not (run / "eval.json").exists()


def test_documents_start_with_the_token_that_the_tokenizer_puts_before_every_text(
  convert, checkpoint, tmp_path
):
  folder, run = checkpoint("llama"), tmp_path / "run"
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  tokenizer.add_special_tokens(["<s>"])
  tokenizer.enable_padding(length=16)  # as a fine-tune may have left it
  start_id = tokenizer.token_to_id("<s>")
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", start_id)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  convert(f"--from_hf={folder}", f"--workdir={run}")
  saved = load_tokenizer(run / "tokenizer.json")
  assert (saved.start_id, saved.eod_id) == (start_id, 0)
  assert encode_prompt(saved, "a<s>").tolist() == [start_id, 2, 1, 20, 1]
  assert saved.decode([start_id, 2, 0]) == "a"
  assert Workdir(run).experiment().data.tokenizer.start == "<s>"


def test_a_prompt_has_nothing_in_front_where_the_tokenizer_adds_nothing(
  convert, checkpoint, here, tmp_path, monkeypatch
):
  folder, run, seen = checkpoint("olmoe"), tmp_path / "run", []
  (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
  convert(f"--from_hf={folder}", f"--workdir={run}")
  assert encode_prompt(run_flags.load_run(run).tokenizer, "ab").tolist() == [2, 3]
  # A run converted before tokenizers were saved with what they add.
  saved = json.loads((run / "tokenizer.json").read_text())
  assert saved.pop("made_elsewhere")
  (run / "tokenizer.json").write_text(json.dumps(saved))
  monkeypatch.setattr("jaxmoe.runs.generation.generate", lambda *about: seen.append(about))
  assert here("generate", f"--workdir={run}", "--prompt=ab", "--prompt=c").code == 0
  assert [row.tolist() for row in seen[0][2]] == [[2, 3], [4]]
  assert seen[0][4][1] == {0, 7}, "it ends where the model's own files say, in a chat or not"


def test_damage_to_a_converted_run_is_found(convert, checkpoint, here, tmp_path):
  run = tmp_path / "run"
  convert(f"--from_hf={checkpoint('llama')}", f"--workdir={run}")
  step = run / "checkpoints" / "0"
  label = json.loads((step / "label" / "metadata").read_text())
  norm = tensors_of(GOLDEN / "llama")["model.norm.weight"]
  words = digest({"x": jnp.asarray(norm)})["x"]
  assert label["arrays"]["params/final_norm/scale"]["digest"] == list(words)
  for path in (step / "arrays").rglob("d/*"):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
  result = here("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'back'}")
  assert result.code == 4 and "no intact checkpoint" in result.err
  assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


def test_training_starts_from_a_converted_run_with_fresh_moments(convert, checkpoint, tmp_path):
  run = tmp_path / "run"
  convert(f"--from_hf={checkpoint('llama')}", f"--workdir={run}")
  experiment = Workdir(run).experiment()
  decoder = experiment.decoder()
  spec = StateSpec(decoder, experiment.transform(decoder), one_device())
  step, arrays, record = read_state(open_store(run / "checkpoints"), spec, pytest.fail)
  state = spec.from_arrays(arrays)
  assert (step, int(state.step), record["only"]) == (0, 0, "params")
  table = tensors_of(GOLDEN / "llama")["model.embed_tokens.weight"]
  np.testing.assert_array_equal(state.params["embed"]["table"], table)
  moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert len(moments) > 20 and not any(np.any(x) for x in moments)


@pytest.mark.slow
def test_a_converted_run_trains_on(convert, checkpoint, here, text, tmp_path):
  run, out = tmp_path / "run", tmp_path / "sparse"
  small = ("data.held_out=0.3", "data.seq_len=32", "train.num_steps=3", "train.batch_size=2",
           "optim.schedule.warmup_steps=1", "evaluation.every=0", "samples.every=0")  # fmt: skip
  flags = [f"--config.{change}" for change in small]
  convert(f"--from_hf={checkpoint('llama')}", f"--workdir={run}", f"--text={text}", *flags)
  result = here("surgery", f"--workdir={run}", f"--out={out}", "--upcycle=2", "--active=2")
  assert result.code == 0, result
  result = here("train", f"--config={run}/config.json", f"--workdir={run}")
  assert result.code == 0, result
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3]
  assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_model_of_no_family_is_refused_with_what_is_in_the_way(trained, here, tmp_path):
  config = json.loads((trained / "config.json").read_text())
  changed = tmp_path / "changed"
  shutil.copytree(trained, changed)
  config["model"]["stack"][0]["pattern"][0]["ffn"]["router"]["scale"] = 2.0
  (changed / "config.json").write_text(json.dumps(config))
  result = here("convert", f"--workdir={changed}", f"--to_hf={tmp_path / 'out'}")
  assert result.code == 2 and "the nearest, mixtral, differs in" in result.err, result
  assert "router.scale (2.0, it can have 1.0)" in result.err


def test_a_run_trained_here_is_written_in_the_names_of_a_family(trained, here, tmp_path):
  out = tmp_path / "out"
  result = here("convert", f"--workdir={trained}", f"--to_hf={out}")
  assert result.code == 0 and "MixtralForCausalLM of step 6" in result.out, result
  config = json.loads((out / "config.json").read_text())
  assert (config["model_type"], config["vocab_size"]) == ("mixtral", 257)


def write_large(folder):
  """A checkpoint of 2.1 GB in bfloat16, 1.07e9 parameters, a layer a shard."""
  dim, hidden, experts, layers, vocab = 1024, 1280, 16, 16, 8000
  plain = json.loads((GOLDEN / "mixtral" / "config.json").read_text())
  plain |= {
    "hidden_size": dim, "intermediate_size": hidden, "num_local_experts": experts,
    "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": vocab, "head_dim": 64, "eos_token_id": 0,
  }  # fmt: skip
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(plain))
  write_tokenizer(folder)
  rng, weight_map = np.random.default_rng(0), {}

  def save(at, shapes):
    file = f"model-{at:05}-of-{layers:05}.safetensors"
    tensors = {
      name: rng.integers(0, 2**14, shape, dtype=np.uint16).view(jnp.bfloat16)
      for name, shape in shapes.items()
    }
    safetensors.numpy.save_file(tensors, folder / file)
    weight_map.update(dict.fromkeys(tensors, file))

  heads = {"q": (1024, dim), "k": (256, dim), "v": (256, dim), "o": (dim, 1024)}
  matrices = {"w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden)}
  for depth in range(layers):
    under = f"model.layers.{depth}."
    shapes = {f"{under}self_attn.{name}_proj.weight": shape for name, shape in heads.items()}
    shapes |= {f"{under}{norm}_layernorm.weight": (dim,) for norm in ("input", "post_attention")}
    shapes[f"{under}block_sparse_moe.gate.weight"] = (experts, dim)
    for expert, (name, shape) in itertools.product(range(experts), matrices.items()):
      shapes[f"{under}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    if depth == 0:
      shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, dim))
      shapes["model.norm.weight"] = (dim,)
    save(depth + 1, shapes)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_of(process):
  """Waits for a process; returns the most anonymous memory it had, in bytes."""
  peak = 0
  while process.poll() is None:
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    peak = max(peak, int(found[1]) * 1024 if found else 0)
    time.sleep(0.05)
  out, err = process.communicate()
  assert process.returncode == 0, (out, err)
  return peak


@pytest.mark.slow
def test_a_model_of_two_gigabytes_passes_through_one_of_memory(started, tmp_path):
  there, run, back = (tmp_path / name for name in ("there", "run", "back"))
  write_large(there)
  peaks = [
    peak_of(started("convert", f"--from_hf={there}", f"--workdir={run}")),
    peak_of(started("convert", f"--workdir={run}", f"--to_hf={back}", "--shard_gb=0.5")),
  ]
  print(f"anonymous memory at most {[round(peak / 1e6) for peak in peaks]} MB")
  assert max(peaks) < 1e9
  for path in sorted(there.glob("*.safetensors")):
    index = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    for name, x in safetensors.numpy.load_file(path).items():
      with safetensors.safe_open(back / index[name], framework="numpy") as file:
        assert file.get_tensor(name).tobytes() == x.tobytes(), name


def test_a_converted_run_chats_in_its_own_template(convert, checkpoint, here, tmp_path):
  pytest.importorskip("jinja2")
  folder, run = checkpoint("llama"), tmp_path / "run"
  template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}it: "
  (folder / "chat_template.jinja").write_text(template)
  convert(f"--from_hf={folder}", f"--workdir={run}")
  flags = (f"--workdir={run}", "--max_tokens=4", "--temperature=0")
  chat = here("generate", *flags, "--chat", "--prompt=hello <|end|>")
  plain = here("generate", *flags, "--prompt=user: hello <|end|>\nit: ")
  assert chat.code == plain.code == 0, (chat, plain)
  assert len(chat.out) > 1 and not chat.out.startswith("user")
  path = run / "pretrained" / "chat_template.jinja"
  assert (chat.err, plain.err) == (f"asked with the template of {path}\n", "")
  both = here("generate", *flags, "--chat", "--system=Be brief.", "--prompt=hello <|end|>")
  assert both.code == 0 and both.out != chat.out
  refused = here("generate", *flags, "--system=Be brief.", "--prompt=hello")
  assert refused.code == 2 and "give --chat, too" in refused.err
  for flag in ("--prompt=a\ud800", "--system=a\ud800"):
    refused = here("generate", *flags, "--chat", "--prompt=a", flag)
    assert refused.code == 2 and refused.err.count("\n") == 1
  (run / "pretrained" / "chat_template.jinja").unlink()
  refused = here("generate", *flags, "--chat", "--prompt=a")
  assert refused.code == 2 and "no chat template came with the model" in refused.err
