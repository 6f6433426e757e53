"""The smallest recipe: exactly scorable toy tasks on bytes; what tests and first tries use.

python -m launch.train --config=configs/tiny.py --workdir=runs/tiny
The recipe and what is known of it: jaxmoe/recipes/tiny.py.
"""

from jaxmoe.recipes.tiny import get_config

__all__ = ["get_config"]
