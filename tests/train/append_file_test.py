import os

import pytest

from jaxmoe.train.append_file import AppendFile


class Disk:
  """A file that can take `room` more bytes, as a full disk can; less than none: read-only."""

  def __init__(self, monkeypatch):
    self.room = None
    real = open

    def opened(path, mode="r", **options):
      if self.room is not None and self.room < 0 and mode != "rb":
        raise OSError(30, "Read-only file system")
      return Part(real(path, mode, **options), self)

    monkeypatch.setattr("builtins.open", opened)


class Part:
  def __init__(self, file, disk):
    self._file, self._disk = file, disk

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._file.close()

  def __getattr__(self, name):
    return getattr(self._file, name)

  def write(self, data):
    room = self._disk.room
    if room is None:
      return self._file.write(data)
    written = self._file.write(data[:room])
    self._disk.room -= written
    if not written:
      raise OSError(28, "No space left on device")
    return written


@pytest.fixture
def disk(monkeypatch):
  return Disk(monkeypatch)


@pytest.mark.parametrize("room", [-1, 0, 1, 6])
def test_what_the_disk_refuses_waits_and_comes_whole_and_in_order(tmp_path, disk, room):
  file = AppendFile(tmp_path / "lines")
  assert file.append(b"first\n") == ""
  disk.room = room
  for piece in (b"second\n", b"third\n"):
    assert file.append(piece) != ""
    disk.room = min(room, 0)
    assert (tmp_path / "lines").read_bytes() == b"first\n", "nothing torn is left behind"
  with pytest.raises(OSError, match="lines: "):
    file.sync()
  disk.room = None
  assert file.append(b"fourth\n") == ""
  assert (tmp_path / "lines").read_bytes() == b"first\nsecond\nthird\nfourth\n"
  file.sync()


def test_what_was_torn_and_could_not_be_cut_at_once_is_cut_later(tmp_path, disk, monkeypatch):
  file = AppendFile(tmp_path / "lines")
  file.append(b"first\n")
  disk.room = 3
  monkeypatch.setattr(Part, "truncate", lambda self, end: (_ for _ in ()).throw(OSError(5, "I/O")),
                      raising=False)  # fmt: skip
  assert file.append(b"second\n") != ""
  assert (tmp_path / "lines").read_bytes() == b"first\nsec"
  monkeypatch.delattr(Part, "truncate")
  disk.room = None
  assert file.flush() == ""
  assert (tmp_path / "lines").read_bytes() == b"first\nsecond\n"


def test_another_process_may_cut_the_file_between_two_pieces(tmp_path):
  file = AppendFile(tmp_path / "lines")
  file.append(b"first\n")
  file.append(b"second\n")
  os.truncate(tmp_path / "lines", 6)
  file.append(b"third\n")
  assert (tmp_path / "lines").read_bytes() == b"first\nthird\n"


@pytest.mark.parametrize("torn", [b"sec", bytes(70_000), b"\xff" * 200_000])
def test_what_a_machine_that_went_down_left_torn_is_cut_off_first(tmp_path, torn):
  (tmp_path / "lines").write_bytes(b"first\n" + torn)
  file = AppendFile(tmp_path / "lines")
  file.append(b"second\n")
  file.append(b"third\n")
  assert (tmp_path / "lines").read_bytes() == b"first\nsecond\nthird\n"
