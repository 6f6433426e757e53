"""`python -m launch.convert`, from the clone: jaxmoe/commands/convert.py."""

from jaxmoe.commands.convert import run

if __name__ == "__main__":
  run()
