"""The page as a browser shows it: on a phone and on a wide screen, by day and by night."""

import json
import re
import shutil
import subprocess

import pytest

from jaxmoe.report import write_comparison, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
  not CHROMIUM, reason="no chromium here; the page is not looked at (apt-get install chromium)"
)
FLAGS = (
  "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
  "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
)  # fmt: skip
# Only the copy that is looked at holds a script.
PROBE = """<script>
addEventListener("load", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const sizes = [], bad = [];
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((t) => [t.getBoundingClientRect(), t]);
    texts.forEach(([a, one], i) => {
      if (!a.width) return;
      const name = svg.getAttribute("aria-label") + ": " + one.textContent;
      if (a.left < frame.left - 1 || a.right > frame.right + 1) bad.push(name + " is cut");
      for (const [b, other] of texts.slice(i + 1)) {
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 1 && y > 3) bad.push(name + " meets " + other.textContent);
      }
    });
  }
  for (const mark of document.querySelectorAll("svg .halo")) {
    const axis = mark.closest("svg").querySelector(".axis").getBoundingClientRect();
    if (axis.width && mark.getBoundingClientRect().bottom > axis.top + 1)
      bad.push(mark.textContent + " is on the axis");
  }
  for (const one of document.querySelectorAll(".scroll"))
    if (one.scrollWidth > one.clientWidth) bad.push("cut: " + one.textContent.slice(0, 60));
  for (const one of document.querySelectorAll(".tile b"))
    if (one.scrollWidth > one.clientWidth || one.getClientRects()[0].height > 30)
      bad.push("a tile in two lines or cut: " + one.textContent);
  for (const one of document.querySelectorAll(".grid, .tiles")) {
    const rows = new Map(), frame = one.getBoundingClientRect();
    for (const box of [...one.children].map((card) => card.getBoundingClientRect()))
      rows.set(Math.round(box.top), Math.max(rows.get(Math.round(box.top)) || 0, box.right));
    for (const [top, right] of rows)
      if (frame.width && right < frame.right - 1) bad.push("an empty place at " + top);
  }
  for (const text of document.querySelectorAll("body *")) {
    const own = [...text.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || text.closest("script, title, style, details:not([open]) > :not(summary)")) continue;
    const box = text.getBoundingClientRect();
    if (!box.width) continue;
    let size = parseFloat(getComputedStyle(text).fontSize);
    const svg = text.closest("svg");
    if (svg) size *= svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    sizes.push([size, text.textContent.trim().slice(0, 40)]);
  }
  sizes.sort((a, b) => a[0] - b[0]);
  const root = document.documentElement;
  const found = {
    width: innerWidth, scroll: root.scrollWidth, smallest: sizes[0], texts: sizes.length, bad,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def pages(run_of, tmp_path_factory):
  """Returns the paths of pages with a probe in them, of a run with a long name among others."""
  folder = tmp_path_factory.mktemp("browser")
  runs = [folder / "run", folder / ("a_name_without_a_space_longer_than_a_phone_is_wide" * 2)]
  for run in runs:
    run_of(run, dying={3: 42})
  made = {"run": write_report(runs[0]), "long_name": write_report(runs[1])}
  made["comparison"] = write_comparison(runs, folder / "comparison.html")
  for name, page in made.items():
    text = page.read_text().replace("</body>", PROBE + "</body>")
    made[name] = folder / f"{name}_probed.html"
    made[name].write_text(text)
  return made


def look(page, width, dark, folder):
  """Returns what the probe found, and what the console said."""
  scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
  command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", f"--window-size={width},2000", scheme]
  # A headless window is not made narrower than 500; a frame is.
  frame = page.with_name(f"frame{width}.html")
  frame.write_text(
    f'<body style="margin:0"><iframe src="{page.name}" width="{width}" height="1900" '
    'style="border:0"></iframe><script>onload = () => { const found = '
    'document.querySelector("iframe").contentDocument.getElementById("probe"); '
    "document.body.append(found); }</script></body>"
  )
  url = f"file://{frame}"
  options = ["--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom"]
  done = subprocess.run([*command, *options, url], capture_output=True, text=True, timeout=120)
  (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout)
  said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  return json.loads(found.replace("&amp;", "&")), said


def brightness(color):
  red, green, blue = map(int, re.findall(r"\d+", color)[:3])
  return 0.3 * red + 0.59 * green + 0.11 * blue


@pytest.mark.parametrize(
  "width, dark", [(400, False), (400, True), (800, False), (1400, False), (1400, True)]
)
@pytest.mark.parametrize("name", ["run", "long_name", "comparison"])
def test_the_page_is_readable(pages, tmp_path, name, width, dark):
  found, said = look(pages[name], width, dark, tmp_path)
  assert found["width"] == width
  assert found["scroll"] <= width, "nothing reaches over the side"
  assert found["bad"] == [], "nothing is cut, written over another, or leaves a place empty"
  assert found["texts"] > 100
  assert found["smallest"][0] >= 10, found["smallest"]
  paper, ink = brightness(found["background"]), brightness(found["ink"])
  assert (paper < 60 and ink > 180) if dark else (paper > 200 and ink < 80)
  assert said == []
