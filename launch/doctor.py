"""`python -m launch.doctor`, from the clone: jaxmoe/commands/doctor.py."""

from jaxmoe.commands.doctor import run

if __name__ == "__main__":
  run()
