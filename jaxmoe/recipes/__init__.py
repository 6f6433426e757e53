"""Recipes that come with the package, by name: `--config=NAME`, or `jaxmoe.recipe(NAME)`.

To add one, write its file and add one line to RECIPES. `configs/NAME.py` is the same recipe as a
path, for commands in the clone.
"""

from collections.abc import Callable

from jaxmoe.recipes import mixtral_8x7b, olmoe_1b_7b, quickstart, qwen3_30b_a3b, tiny
from jaxmoe.train.experiment import Experiment

RECIPES: dict[str, Callable[..., Experiment]] = {
  "mixtral_8x7b": mixtral_8x7b.get_config,
  "olmoe_1b_7b": olmoe_1b_7b.get_config,
  "quickstart": quickstart.get_config,
  "qwen3_30b_a3b": qwen3_30b_a3b.get_config,
  "tiny": tiny.get_config,
}

__all__ = ["RECIPES"]
