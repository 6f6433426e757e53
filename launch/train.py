"""`python -m launch.train`, from the clone: jaxmoe/commands/train.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("train")
