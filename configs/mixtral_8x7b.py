"""The shape of Mixtral-8x7B: 8 experts of which 2 are active, 46.7B parameters, 12.9B active.

python -m launch.train --config=configs/mixtral_8x7b.py --workdir=runs/mixtral_8x7b
The recipe and what is known of it: jaxmoe/recipes/mixtral_8x7b.py.
"""

from jaxmoe.recipes.mixtral_8x7b import get_config

__all__ = ["get_config"]
