"""`python -m launch.oracle`, from the clone: jaxmoe/commands/oracle.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("oracle")
