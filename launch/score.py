"""`python -m launch.score`, from the clone: jaxmoe/commands/score.py."""

from jaxmoe.commands.score import run

if __name__ == "__main__":
  run()
