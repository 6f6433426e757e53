"""The shape of OLMoE-1B-7B: 64 experts of which 8 are active, 6.9B parameters, 1.3B active.

python -m launch.train --config=configs/olmoe_1b_7b.py --workdir=runs/olmoe_1b_7b
The recipe and what is known of it: jaxmoe/recipes/olmoe_1b_7b.py.
"""

from jaxmoe.recipes.olmoe_1b_7b import get_config

__all__ = ["get_config"]
