"""`python -m launch.parity`, from the clone: jaxmoe/commands/parity.py."""

from jaxmoe.commands.parity import run

if __name__ == "__main__":
  run()
