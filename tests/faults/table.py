"""What is done to a run, what is promised, and how it went: the table the suite ends with."""

CHECKPOINT = "set aside and named, an older one used; 4 and one line if all are damaged"
HARM = "skipped, then a rollback; killed too, it ends as if not killed; or 3 over the budget"
REFUSED = "2 and one line with the difference, nothing written"
KINDS = {
  "sigkill_in_compile": ("killed while the step is traced and compiled", "recovers"),
  "sigkill_in_step": ("killed in a step or between two", "recovers"),
  "sigkill_in_save": (
    "killed before, in and after a save, at its rename, at the removal of an old step", "recovers"
  ),
  "sigkill_in_restore": ("killed while it goes on from a checkpoint", "recovers"),
  "sigkill_in_evaluation": ("killed while it is scored", "recovers"),
  "sigkill_in_samples": ("killed while samples are written", "recovers"),
  "sigkill_in_data": ("killed while the corpus is read or a batch made", "recovers"),
  "sigkill_again_and_again": ("killed five times in a row, anywhere", "recovers"),
  "sigterm_once": ("told to stop at any moment", "42, or 0 if it was done; recovers"),
  "sigterm_twice": ("told to stop, and again while it saves", "42 at once; recovers"),
  "ctrl_c_once": ("interrupted at any moment", "130, or 0 if it was done; recovers"),
  "ctrl_c_twice": ("interrupted, and again while it saves", "130 at once; recovers"),
  "data_worker_killed": ("the process that makes batches dies", "goes on, equal metrics"),
  "data_worker_stopped": ("the process that makes batches hangs", "goes on, equal metrics"),
  "sigkill_with_data_worker": (
    "killed while another process makes batches", "that process ends too; recovers"
  ),
  "stalled_step": (
    "hangs in data, a step, evaluation, samples or a save", "42 with all stacks; recovers"
  ),
  "full_disk": (
    "the disk is full, for a while or for good",
    "goes on, equal metrics; or 4 after three failed saves, recovers with room",
  ),
  "read_only_disk": (
    "the disk becomes read-only, for a while or for good",
    "goes on, equal metrics; or 4 after three failed saves, recovers when writable",
  ),
  "checkpoint_file_flipped": ("a bit of any file of a checkpoint flips", CHECKPOINT),
  "checkpoint_file_truncated": ("any file of a checkpoint loses its end", CHECKPOINT),
  "checkpoint_file_emptied": ("any file of a checkpoint is empty", CHECKPOINT),
  "checkpoint_file_deleted": ("any file of a checkpoint is gone", CHECKPOINT),
  "torn_metrics_line": (
    "the last line of metrics.jsonl torn, or garbage or zeros behind it", "recovers"
  ),
  "torn_events_line": ("the same in events.jsonl", "recovers; no other event is lost"),
  "nan_in_batch": ("token ids outside the vocabulary: NaN", HARM),
  "nan_in_parameter": ("a number of a parameter becomes NaN", HARM),
  "nan_in_router_score": ("a token's router scores become NaN", HARM),
  "loss_spike": ("loss and gradients, or all parameters, grow manyfold", HARM),
  "other_model": ("a recipe or a checkpoint of another model", REFUSED),
  "other_tokenizer": ("another tokenizer, or another file of the same name", REFUSED),
  "other_data": ("another mixture, or a text added, removed or changed", REFUSED),
}
COLUMNS = ("kind", "what happens", "promised", "seeds", "recovered", "ended as stated", "failed")


def rows(outcomes):
  """Yields the lines of the table, in Markdown, of (kind, outcome) pairs."""
  yield "| " + " | ".join(COLUMNS) + " |"
  yield "| --- | --- | --- | ---: | ---: | ---: | ---: |"
  for kind, (what, promise) in KINDS.items():
    of = [outcome for name, outcome in outcomes if name == kind]
    if of:
      counts = [len(of), *(of.count(each) for each in ("recovered", "ended as stated", "failed"))]
      yield f"| {kind} | {what} | {promise} | " + " | ".join(map(str, counts)) + " |"
