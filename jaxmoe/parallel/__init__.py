"""Engines that spread weights, state and activations over the devices of a mesh."""

from jaxmoe.parallel.degrees import AXES, TOKEN_AXES, Parallel, make_mesh

__all__ = ["AXES", "TOKEN_AXES", "Parallel", "make_mesh"]
