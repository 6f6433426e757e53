"""A start is timed to its first sign; a process that ends without one says its last line."""

import os
import sys

import pytest

from jaxmoe.bench.sides.first_sign import first_sign
from jaxmoe.bench.sides.process import SideError

WORK = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass\n"


def test_seconds_end_at_the_sign_and_the_process_with_them(tmp_path):
  sign, later = tmp_path / "sign", tmp_path / "later"
  code = f"{WORK}open({str(sign)!r}, 'w').write('x')\n" + 100 * WORK + f"open({str(later)!r}, 'w')"
  seconds = first_sign([sys.executable, "-c", code], os.environ, sign)
  assert seconds.wall >= seconds.cpu - 0.05 and seconds.cpu >= 0.25
  assert not later.exists()


def test_without_a_sign_the_end_counts_and_a_failure_is_told(tmp_path):
  assert first_sign([sys.executable, "-c", WORK], os.environ).cpu >= 0.25
  with pytest.raises(SideError, match="no luck"):
    first_sign([sys.executable, "-c", "raise SystemExit('no luck')"], os.environ)
  with pytest.raises(SideError, match="ended with 0"):
    first_sign([sys.executable, "-c", ""], os.environ, tmp_path / "sign")
