"""`python -m launch.convert`, from the clone: jaxmoe/commands/convert.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("convert")
