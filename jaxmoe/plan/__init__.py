"""What a run needs before it runs: where arrays lie, what is sent, what it takes."""

from jaxmoe.plan.explain import Explanation, explain
from jaxmoe.plan.page import page

__all__ = ["Explanation", "explain", "page"]
