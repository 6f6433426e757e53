"""The shape of Qwen3-30B-A3B: 128 experts of which 8 are active, 30.5B parameters, 3.3B active.

python -m launch.train --config=configs/qwen3_30b_a3b.py --workdir=runs/qwen3_30b_a3b
The recipe and what is known of it: jaxmoe/recipes/qwen3_30b_a3b.py.
"""

from jaxmoe.recipes.qwen3_30b_a3b import get_config

__all__ = ["get_config"]
