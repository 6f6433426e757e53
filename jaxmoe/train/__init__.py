"""Training: the record of an experiment, its step, its loop, and what the loop leaves behind."""
