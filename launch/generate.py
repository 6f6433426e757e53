"""`python -m launch.generate`, from the clone: jaxmoe/commands/generate.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("generate")
