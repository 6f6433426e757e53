"""`python -m launch.explain`, from the clone: jaxmoe/commands/explain.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("explain")
