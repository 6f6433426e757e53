"""`python -m launch.generate`, from the clone: jaxmoe/commands/generate.py."""

from jaxmoe.commands.generate import run

if __name__ == "__main__":
  run()
