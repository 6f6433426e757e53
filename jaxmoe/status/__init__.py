"""A run's state from its files alone, without JAX."""
