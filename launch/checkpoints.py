"""`python -m launch.checkpoints`, from the clone: jaxmoe/commands/checkpoints.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("checkpoints")
