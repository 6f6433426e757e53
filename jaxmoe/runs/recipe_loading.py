"""From `--config=NAME:router=topk` or a path in its place, and `--config.x.y=V`, to a recipe.

The config.json of a run is a recipe too, without names.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import pathlib
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.core.config_io import as_begun, diff, from_json, override, unknown
from jaxmoe.core.errors import InputError
from jaxmoe.core.renamed import advice
from jaxmoe.recipes import RECIPES
from jaxmoe.train.experiment import Experiment

PREFIX = "--config."
_SHOWN = 3


def load_recipe(spec: str | None, overrides: Sequence[str], begun: Any = None) -> Experiment:
  """Returns the recipe of a config argument with its overrides.

  Args:
    spec: A name of RECIPES or the path of a file, and after a colon `name=value` keywords of its
      `get_config`; or a config.json.
    overrides: Arguments such as `--config.train.num_steps=100`.
    begun: What the config.json of the run holds that is to go on, where there is one: fields that
      came later are as it has them, unless an override names them.

  Raises:
    InputError: no such recipe, file or keyword, or a value that does not fit.
  """
  if not spec:
    raise _missing()
  if spec.endswith(".json"):
    return override(_read_json(spec), parse_changes(overrides))
  path, names = file_of(spec), spec.partition(":")[2]
  get_config = _get_config(path)
  keywords = _keywords(get_config, names, path)
  changes = parse_changes(overrides)
  experiment = _run(path, lambda: get_config(**keywords))
  if not isinstance(experiment, Experiment):
    kind = type(experiment).__name__
    raise InputError(f"--config={path}: get_config() must return an Experiment, not {kind}")
  return override(as_begun(experiment, begun), changes)


def recipe(name: str | os.PathLike[str], **settings: Any) -> Experiment:
  """Returns a recipe by its name, or the path of its file or of a run's config.json.

  Args:
    name: As behind --config.
    **settings: Keywords of its `get_config`, and fields by path: `**{"train.seed": 3}`.

  Raises:
    InputError: no such recipe, keyword or field, or a value that does not fit.
  """
  if not isinstance(name, str | os.PathLike):
    raise InputError(f"{name!r} is no recipe; give a name, such as 'tiny', or a path")
  name = os.fspath(name)
  if not name:
    raise _missing()
  changes = [(path, _as_text(value)) for path, value in settings.items() if "." in path]
  keywords = {key: value for key, value in settings.items() if "." not in key}
  if name.endswith(".json"):
    if keywords:
      raise unknown(f"--config={name}", "name", next(iter(keywords)), ())
    return override(_read_json(name), changes)
  get_config = _get_config(name)
  parameters = inspect.signature(get_config, eval_str=True).parameters
  for keyword, value in keywords.items():
    if keyword not in parameters:
      raise unknown(f"--config={name}", "name", keyword, parameters)
    kind = parameters[keyword].annotation
    if isinstance(kind, type) and not isinstance(value, kind | int if kind is float else kind):
      raise InputError(f"--config={name}:{keyword}: expected {kind.__name__}, got {value!r}")
  return override(_run(name, lambda: get_config(**keywords)), changes)


def _missing() -> InputError:
  return InputError(
    "--config is missing; give a recipe, such as --config=tiny or --config=configs/tiny.py"
  )


def _as_text(value: Any) -> str:
  """Returns a value as a command line has it."""
  if isinstance(value, list | tuple):
    return ",".join(map(_as_text, value))
  return "none" if value is None else str(value)


def file_of(spec: str) -> str:
  """Returns the path of the file, or the name of the recipe, that a config argument gives."""
  return spec if spec.endswith(".json") else spec.partition(":")[0]


def kept_line(asked: Experiment, begun: Experiment) -> str:
  """Returns what to say of a run that goes on as it was begun, not as it would begin today."""
  paths = list(dict.fromkeys(re.sub(r"(\.\d+)+$", "", path) for path in diff(asked, begun)))
  some = ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if paths[_SHOWN:] else "")
  return f"note: goes on as it was begun, where new runs have other defaults: {some}"


def parse_changes(overrides: Sequence[str]) -> list[tuple[str, str]]:
  """Returns (field, text) of arguments such as `--config.train.num_steps=100`."""
  changes = []
  for argument in overrides:
    field, equals, text = argument.removeprefix(PREFIX).partition("=")
    if not equals:
      raise InputError(f"{argument}: expected {PREFIX}FIELD=VALUE")
    changes.append((field, text))
  return changes


def recipe_origin(spec: str, experiment: Experiment) -> dict[str, Any]:
  """Returns the name of a recipe and where a run differs from what its file returns unasked.

  The form is `{"name": spec, "changes": {path: [the recipe's, the run's]}}`; `changes` is None
  for a file whose keywords have no defaults.
  """
  if spec.endswith(".json"):
    changed = diff(_read_json(spec), experiment)
    return {"name": spec, "changes": {name: list(pair) for name, pair in changed.items()}}
  path = file_of(spec)
  get_config = _get_config(path)
  try:
    changes = {name: list(pair) for name, pair in diff(_run(path, get_config), experiment).items()}
  except InputError:
    return {"name": spec, "changes": None}
  return {"name": spec, "changes": changes}


def _read_json(path: str) -> Experiment:
  """Returns the recipe of a config.json."""
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"--config={path}: cannot be read ({error}); give the config.json of a run, or a recipe"
    ) from None
  return from_json(Experiment, text, path)


def _get_config(path: str) -> Callable[..., Experiment]:
  if path in RECIPES:
    return RECIPES[path]
  if not os.path.isfile(path):  # pathlib's form raises where a name is too long
    there = [*RECIPES, *sorted(str(other) for other in pathlib.Path("configs").glob("*.py"))]
    raise InputError(f"--config={path}: no such recipe or file; there are: {', '.join(there)}")
  spec = importlib.util.spec_from_file_location(f"recipe_{pathlib.Path(path).stem}", path)
  if spec is None or spec.loader is None:
    raise InputError(f"--config={path}: not a Python file")
  module = importlib.util.module_from_spec(spec)
  _run(path, functools.partial(spec.loader.exec_module, module))
  if not callable(getattr(module, "get_config", None)):
    raise InputError(f"--config={path}: the file has no get_config(); define it")
  return module.get_config


def _run(path: str | pathlib.Path, code: Callable[[], Any]) -> Any:
  """Returns what the code of a recipe returns; what it raises becomes one line with the place.

  Raises:
    InputError: the recipe raised something, were it `SystemExit`.
  """
  try:
    return code()
  except InputError as error:
    raise InputError(f"--config={path}: {error}") from None
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f"{path}:{line}" if line else str(path)
    advised = advice(Experiment, str(error)) if isinstance(error, TypeError) else ""
    raise InputError(
      f"--config={place}: the recipe fails with {type(error).__name__}: {error}; "
      f"{advised}mend the file"
    ) from None


def _keywords(get_config: Callable[..., Any], text: str, path: str) -> dict[str, Any]:
  """Returns the keywords of `name=value,...`, parsed by the annotations of `get_config`."""
  parameters = inspect.signature(get_config, eval_str=True).parameters
  keywords: dict[str, Any] = {}
  for pair in filter(None, text.split(",")):
    name, equals, value = pair.partition("=")
    if not equals:
      raise InputError(f"--config={path}:{text}: expected name=value, got {pair!r}")
    if name not in parameters:
      raise unknown(f"--config={path}", "name", name, parameters)
    if name in keywords:
      raise InputError(f"--config={path}: {name} is given twice")
    keywords[name] = _parse(parameters[name].annotation, value, f"--config={path}:{name}")
  return keywords


def _parse(kind: Any, value: str, where: str) -> Any:
  if kind not in (int, float, str, bool):
    raise InputError(f"{where}: cannot be set here; only int, float, str and bool keywords can")
  if kind is bool:
    if value not in ("true", "false"):
      raise InputError(f"{where}: expected true or false, got {value!r}")
    return value == "true"
  try:
    return kind(value)
  except ValueError:
    raise InputError(f"{where}: expected {kind.__name__}, got {value!r}") from None
