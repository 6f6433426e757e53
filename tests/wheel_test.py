"""The wheel: built, installed beside this environment's packages, and used from another folder."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest

from tests.commands.conftest import CHANGES, HOME, share_programs
from tests.models.pretrained.checkpoint import write_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
SHORT = [f"--config.{change}" for change in CHANGES]
# As one uses the package from Python. What a person has, small ones stand in for: of the run, a
# trained `tiny`; of OLMoE-1B-7B and of a dense model, random ones of their families; of quickstart,
# whose corpus takes half a minute to read, `tiny` with as few steps.
SKETCH = """
import sys
import jaxmoe
assert "jax" not in sys.modules and "flax" not in sys.modules
assert "site-packages" in jaxmoe.__file__, jaxmoe.__file__
run = jaxmoe.open("runs/tiny")
public = jaxmoe.from_pretrained("OLMoE-1B-7B-folder")
(text,) = run.generate(["def main("], max_tokens=64)
answer = run.chat([("user", "hi")])
assert isinstance(text, str) and isinstance(answer, str)
assert run.evaluate("folder/")["bits_per_byte"] > 0
ids = [[1, 2, 3, 4], [5, 6, 7, 8]]
s = run.score(ids, return_routing=True)
assert (run.score(ids, routing=s.routing).logprobs == s.logprobs).all()
of_public = public.score(ids, return_routing=True)
assert (public.score(ids, routing=of_public.routing).logprobs == of_public.logprobs).all()
assert len(public.generate(["ab", "cd"], max_tokens=4)) == 2
dense = jaxmoe.open("runs/dense")
assert dense.upcycle(num_experts=8).save("runs/b").step == 0
dense.save_pretrained("hf_out/", dtype="bfloat16")
assert jaxmoe.from_pretrained("hf_out/").experiment.model.param_dtype == "bfloat16"
public.save_pretrained("olmoe_out/")
assert jaxmoe.recipe("quickstart", num_steps=200).train.num_steps == 200
steps = []
recipe = jaxmoe.recipe("tiny", **{"train.num_steps": 4, "evaluation.every": 0, "samples.every": 0})
assert jaxmoe.fit(recipe, "runs/q", on_step=steps.append).step == 4
assert [line["step"] for line in steps] == [1, 2, 3, 4]
import jax
from flax import nnx
moe = jaxmoe.nn.MoE(jaxmoe.MoEConfig(num_experts=8, num_active=2), dim=512, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (2, 3, 512))
y, aux = moe(x)
assert y.shape == x.shape and y.any() and aux.loss > 0
print("all is well")
"""


def call(*command, cwd, code=0, **env):
  """Returns what a command prints, its error where it is to be refused; it must end with `code`."""
  done = subprocess.run(
    [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=1800,
    env={**os.environ, **{name: str(value) for name, value in env.items()}},
  )  # fmt: skip
  assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
  return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Returns the wheel of a copy of what git holds of the package, built without an index."""
  source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  left_out = shutil.ignore_patterns("__pycache__")
  shutil.copytree(ROOT / "jaxmoe", source / "jaxmoe", ignore=left_out)
  pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
  call(*pip, "--quiet", f"--wheel-dir={out}", source, cwd=out)
  (found,) = out.glob("jaxmoe-*.whl")
  return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
  """Returns a folder in which the wheel is installed, and nothing else."""
  folder = tmp_path_factory.mktemp("site")
  pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet")
  call(*pip, f"--target={folder}", wheel, cwd=folder)
  return folder


@pytest.fixture
def installed(site):
  """Returns an environment in which the installed package is found, and the tests' programs."""
  share_programs()
  return {"PYTHONPATH": site, "XDG_CACHE_HOME": HOME, "JAX_PLATFORMS": "cpu"}


def test_the_wheel_has_all_of_the_package_and_nothing_else(site):
  def files(folder):
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}

  assert files(site / "jaxmoe") == files(ROOT / "jaxmoe")
  there = {path.name.partition("-")[0] for path in site.iterdir()}
  assert there == {"jaxmoe", "bin"}


def test_the_installed_package_trains_from_another_folder(site, installed, tmp_path):
  code = "import jaxmoe; print(jaxmoe.__file__)"
  where = call(sys.executable, "-c", code, cwd=tmp_path, **installed)
  assert where.strip() == str(site / "jaxmoe" / "__init__.py")
  assert "jaxmoe train" in call(site / "bin" / "jaxmoe", cwd=tmp_path, **installed)
  train = (site / "bin" / "jaxmoe", "train", "--config=tiny", "--workdir=runs/tiny", *SHORT)
  shown = call(*train, cwd=tmp_path, **installed)
  assert "score it:    jaxmoe evaluate --workdir=runs/tiny" in shown
  lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_empty_environment_with_the_wheel_alone_does_all_of_it(wheel, tmp_path):
  venv.create(tmp_path / "venv", with_pip=True)
  bin_, work = tmp_path / "venv" / "bin", tmp_path / "work"
  (work / "folder").mkdir(parents=True)
  (work / "folder" / "a.txt").write_text("def f(x):\n  return x\n" * 9)
  write_checkpoint("llama", work / "dense")
  write_checkpoint("olmoe", work / "OLMoE-1B-7B-folder")
  env = {"PYTHONPATH": "", "XDG_CACHE_HOME": tmp_path / "cache", "JAX_PLATFORMS": "cpu"}
  call(bin_ / "python", "-m", "pip", "install", "--quiet", wheel, cwd=work, PYTHONPATH="")
  for line in (
    ("train", "--config=tiny", "--workdir=runs/tiny", *SHORT),
    ("evaluate", "--workdir=runs/tiny"),
    ("generate", "--workdir=runs/tiny", "--prompt=copy#", "--max_tokens=8"),
    ("convert", "--from_hf=OLMoE-1B-7B-folder", "--workdir=runs/olmoe"),
    ("convert", "--workdir=runs/olmoe", "--to_hf=back"),
    ("convert", "--from_hf=dense", "--workdir=runs/dense"),
  ):
    call(bin_ / "jaxmoe", *line, cwd=work, **env)
  for path in (work / "OLMoE-1B-7B-folder").glob("*.safetensors"):
    assert (work / "back" / path.name).read_bytes() == path.read_bytes()
  refused = call(bin_ / "jaxmoe", "parity", cwd=work, code=2, **env)
  assert refused.startswith("error: --out is missing: ") and refused.count("\n") == 1
  assert call(bin_ / "python", "-c", SKETCH, cwd=work, **env).endswith("all is well\n")
