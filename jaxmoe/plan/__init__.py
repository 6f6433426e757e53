"""Planning, what a run needs before it runs: where arrays lie, what is sent, what it takes."""

from jaxmoe.plan.explain import Explanation, explain
from jaxmoe.plan.explain_text import explain_text

__all__ = ["Explanation", "explain", "explain_text"]
