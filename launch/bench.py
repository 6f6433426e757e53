"""`python -m launch.bench`, from the clone: jaxmoe/commands/bench.py."""

from jaxmoe.commands.entry import run

if __name__ == "__main__":
  run("bench")
