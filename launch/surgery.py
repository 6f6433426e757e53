"""`python -m launch.surgery`, from the clone: jaxmoe/commands/surgery.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("surgery")
