"""`python -m launch.status`, from the clone: jaxmoe/commands/status.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("status")
