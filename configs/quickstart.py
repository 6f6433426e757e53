"""A small MoE on the Python standard library of this machine; what `make quickstart` runs.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
The recipe and what is known of it: jaxmoe/recipes/quickstart.py.
"""

from jaxmoe.recipes.quickstart import get_config

__all__ = ["get_config"]
