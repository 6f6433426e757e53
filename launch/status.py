"""`python -m launch.status`, from the clone: jaxmoe/commands/status.py."""

from jaxmoe.commands.status import run

if __name__ == "__main__":
  run()
