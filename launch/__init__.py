"""How a run starts, at any scale. Only this package reads flags and the environment."""
