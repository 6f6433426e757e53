"""The faults themselves: planted from outside, in a forked run, before it begins.

A plant is a place and what is done there. A place is a function of the product, found by name,
with the number of its call and the side of it (before or after), or a file operation. Nothing in
the product knows of it.
"""

import fnmatch
import functools
import importlib
import os
import sys
import threading
import time

from tests.faults import disks, numbers, workers


def plant(do, *, at=None, **options):
  """Arranges that `do` happens, at a place if it is not one that lasts all the run."""
  if at is None:
    LASTING[do](**options)
    return
  action = functools.partial(ACTIONS[do], **options)
  delay_s = at.pop("delay_s", 0.0)
  if delay_s:
    action = functools.partial(later, delay_s, action)
  if "file" in at:
    at_file(at["file"], at["like"], at["call"], action)
  else:
    at_call(at["target"], at["call"], at["when"], action)


def later(delay_s, action):
  timer = threading.Timer(delay_s, action)
  timer.daemon = True
  timer.start()


def at_call(target, call, when, action):
  """Acts before or after the `call`-th call of 'module:name' or 'module:Class.name'."""
  owner, name = find(target)
  real, calls = getattr(owner, name), [0]

  @functools.wraps(real)
  def wrapped(*args, **options):
    calls[0] += 1
    here = calls[0] == call
    if here and when == "before":
      action()
    result = real(*args, **options)
    if here and when == "after":
      action()
    return result

  setattr(owner, name, wrapped)


def find(target):
  """Returns (owner, name) of a place that is there: of a module or a class of its own."""
  module, _, path = target.partition(":")
  owner = importlib.import_module(module)
  *parents, name = path.split(".")
  for parent in parents:
    owner = getattr(owner, parent)
  assert name in vars(owner), f"{target} is not there any more"
  return owner, name


def at_file(event, like, call, action):
  """Acts just before the `call`-th file operation of Python's `event` on a path like `like`."""
  calls = [0]

  def watch(name, arguments):
    if name != event or not arguments:
      return
    paths = [str(each) for each in arguments[:2] if isinstance(each, (str, os.PathLike))]
    if any(fnmatch.fnmatch(path, like) for path in paths):
      calls[0] += 1
      if calls[0] == call:
        action()

  sys.addaudithook(watch)


def shoot(number):
  os.kill(os.getpid(), number)


def shoot_twice(number, pause_s):
  shoot(number)
  later(pause_s, functools.partial(shoot, number))


def shoot_then_stay(number, pause_s):
  """Gets one signal, and the second while the run is held up here."""
  shoot_twice(number, pause_s)
  stay(600.0)


def stay(seconds):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    time.sleep(0.05)


LASTING = {**numbers.FAULTS, "watch_worker": workers.watch_worker}
ACTIONS = {
  "shoot_worker": workers.shoot_worker,
  "shoot": shoot,
  "shoot_twice": shoot_twice,
  "shoot_then_stay": shoot_then_stay,
  "stay": stay,
  "fill": disks.fill,
  "free": disks.free,
  "lock": disks.lock,
  "unlock": disks.unmount,
}
