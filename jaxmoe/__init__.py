"""Mixture-of-Experts language models in JAX: train, adapt, compress, serve and plan.

Importing this package imports nothing else, starts no backend and reads no environment. The
packages below it stand on levels; each imports only from lower levels (README, "The tree").
"""

__version__ = "0.1.0"
