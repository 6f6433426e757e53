"""`python -m launch.parity`, from the clone: jaxmoe/commands/parity.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("parity")
