"""Routers. A router is a record here; `build` gives the module with its gate.

To add one, write its file, add one line to ROUTERS, and the contract test runs it.
"""

from jaxmoe.moe.routers.topk import TopK

ROUTERS = {"topk": (TopK, TopK())}

__all__ = ["ROUTERS", "TopK"]
