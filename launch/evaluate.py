"""`python -m launch.evaluate`, from the clone: jaxmoe/commands/evaluate.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("evaluate")
