"""`python -m launch.local`, from the clone: jaxmoe/commands/local.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("local")
