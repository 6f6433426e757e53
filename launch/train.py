"""`python -m launch.train`, from the clone: jaxmoe/commands/train.py."""

from jaxmoe.commands.train import run

if __name__ == "__main__":
  run()
