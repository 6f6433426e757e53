"""`python -m launch.doctor`, from the clone: jaxmoe/commands/doctor.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("doctor")
