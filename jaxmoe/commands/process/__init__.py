"""This process: its flags and exit codes, JAX settings, memory, output, signals and multihost."""
