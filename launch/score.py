"""`python -m launch.score`, from the clone: jaxmoe/commands/score.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("score")
