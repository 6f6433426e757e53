"""Experiments that simulate: the table beside each verdict is the one that its command prints."""

import importlib
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/simulate.py"))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_an_experiment_is_what_its_command_prints(name, capsys):
  importlib.import_module(f"experiments.{name}.simulate").main()
  printed = capsys.readouterr().out
  text = (FOLDER / name / "README.md").read_text()
  assert printed in text, f"the table of experiments/{name} is now\n{printed}"
  assert f"python -m experiments.{name}.simulate" in text and "simulated" in text.lower()
