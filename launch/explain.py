"""`python -m launch.explain`, from the clone: jaxmoe/commands/explain.py."""

from jaxmoe.commands.explain import run

if __name__ == "__main__":
  run()
