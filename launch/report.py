"""`python -m launch.report`, from the clone: jaxmoe/commands/report.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("report")
