"""Commands: flags, environment and what is said; alone touch process-wide JAX settings."""

COMMANDS = {
  "train": "trains the model of a recipe; the same command goes on where it stopped",
  "status": "says how a run stands, while it runs or after",
  "report": "writes what a run did as one page, or several runs laid over each other",
  "evaluate": "scores held-out text in bits per byte, any text, or questions",
  "generate": "continues prompts, or answers in a chat",
  "score": "scores given token ids, and records or replays routing",
  "convert": "makes a run of a public checkpoint, or a public checkpoint of a run",
  "checkpoints": "lists the checkpoints of a run, verifies them, and tells two apart",
  "surgery": "makes a new run of a trained one: insert, open, prune, clone or upcycle experts",
  "oracle": "searches the best expert of each layer for single tokens",
  "explain": "says what a recipe needs before it runs: arrays, collectives, FLOPs, memory",
  "parity": "compares layouts with one device",
  "bench": "times steps, tokens and layers against rivals, and counts their work",
  "doctor": "says whether this machine and installation are fit to train",
  "local": "runs a command as several processes of this machine",
}
"""What each does; `jaxmoe/commands/NAME.py` is the command, as is `launch/NAME.py` in the clone."""
