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
SKETCH = """
import sys
import jaxmoe
assert "jax" not in sys.modules and "flax" not in sys.modules
assert "site-packages" in jaxmoe.__file__, jaxmoe.__file__
run = jaxmoe.open("runs/tiny")
run.generate(["def main("], max_tokens=8);  run.chat([("user", "hi")], max_tokens=8)
run.evaluate("texts/")
ids = [[1, 2, 3, 4], [5, 6, 7, 8]]
s = run.score(ids, return_routing=True)
assert (run.score(ids, routing=s.routing).logprobs == s.logprobs).all()
public = jaxmoe.from_pretrained("llama")
public.generate("ab", max_tokens=4)
dense = jaxmoe.open("runs/llama")
assert dense.upcycle(num_experts=4).save("runs/b").step == 0
dense.save_pretrained("hf_out/", dtype="bfloat16")
steps = []
recipe = jaxmoe.recipe("tiny", **{"train.num_steps": 4, "evaluation.every": 0, "samples.every": 0})
jaxmoe.fit(recipe, "runs/q", on_step=steps.append)
assert len(steps) == 4
if "nn" in jaxmoe.__all__:
  import jax
  from flax import nnx
  config = jaxmoe.MoEConfig(num_experts=8, num_active=2)
  moe = jaxmoe.nn.MoE(config, dim=512, rngs=nnx.Rngs(0))
  y, aux = moe(jax.numpy.ones((2, 3, 512)))
print("all is well")
"""


def call(*command, cwd, **env):
  """Returns what a command prints, which must succeed."""
  done = subprocess.run(
    [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=1800,
    env={**os.environ, **{name: str(value) for name, value in env.items()}},
  )  # fmt: skip
  assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
  return done.stdout


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
  (work / "texts").mkdir(parents=True)
  (work / "texts" / "a.txt").write_text("def f(x):\n  return x\n" * 9)
  write_checkpoint("llama", work / "llama")
  env = {"PYTHONPATH": "", "XDG_CACHE_HOME": tmp_path / "cache", "JAX_PLATFORMS": "cpu"}
  call(bin_ / "python", "-m", "pip", "install", "--quiet", wheel, cwd=work, PYTHONPATH="")
  for line in (
    ("train", "--config=tiny", "--workdir=runs/tiny", *SHORT),
    ("evaluate", "--workdir=runs/tiny"),
    ("generate", "--workdir=runs/tiny", "--prompt=copy#", "--max_tokens=8"),
    ("convert", "--from_hf=llama", "--workdir=runs/llama"),
    ("convert", "--workdir=runs/llama", "--to_hf=back"),
  ):
    call(bin_ / "jaxmoe", *line, cwd=work, **env)
  for path in (work / "llama").glob("*.safetensors"):
    assert (work / "back" / path.name).read_bytes() == path.read_bytes()
  assert call(bin_ / "python", "-c", SKETCH, cwd=work, **env).endswith("all is well\n")
