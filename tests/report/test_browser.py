"""The report as a browser shows it, on a phone and on a laptop."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from acam_kd.report.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000", "--window-size=1400,1000",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

WRAPPER = """<!doctype html><iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{page}"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{  // all its images are loaded by then
  const page = frame.contentDocument, images = [...page.images];
  page.querySelectorAll("details").forEach(x => x.open = true);
  const wide = [...page.body.querySelectorAll("*")].filter(
    x => !x.closest(".scroll *") && x.getBoundingClientRect().right > {width} + 0.5);
  const found = {{
    width: frame.clientWidth, scroll: page.documentElement.scrollWidth, title: page.title,
    broken: images.filter(image => !image.naturalWidth).map(image => image.alt), images: images.length,
    table: page.querySelector("table").offsetWidth, rows: page.querySelectorAll("tbody tr").length,
    wide: wide.map(x => x.tagName + " " + x.textContent.slice(0, 40)),
    panels: [...page.querySelectorAll(".framed")].map(x => [x.clientWidth, x.scrollWidth]),
  }};
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = "found" + JSON.stringify(found) + "end";
}};
</script>"""


def opened(path, width, folder) -> dict:
    """Open the page in a frame of that width and return its measurements."""
    wrapper = folder / f"wrapper{width}.html"
    wrapper.write_text(WRAPPER.format(width=width, page=html.escape(path.read_text())))
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    match = re.search("found({.*})end", html.unescape(done.stdout))
    assert match, done.stdout[-500:] + done.stderr[-1500:]
    return json.loads(match[1])


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits(content, tmp_path, width):
    content["title"] = "A_title_without_any_space_in_it_" * 3
    content["about"]["command"] = "x" * 300
    write_report(tmp_path / "index.html", **content)
    found = opened(tmp_path / "index.html", width, tmp_path)
    assert found["title"] == content["title"] and found["rows"] == 4
    assert found["width"] == width and found["scroll"] <= width and found["wide"] == []
    assert found["images"] == 32 and found["broken"] == []
    assert all(inner <= width for inner, _ in found["panels"]) and len(found["panels"]) == 16
    if width == 400:  # the wide ones scroll inside their own frame
        assert found["table"] > 400 and all(whole > 700 for _, whole in found["panels"])


def test_a_page_with_little_on_it_fits_too(content, tmp_path):
    content |= {"rows": content["rows"][:1], "examples": (), "snapshots": (), "about": {}}
    write_report(tmp_path / "index.html", **content)
    found = opened(tmp_path / "index.html", 400, tmp_path)
    assert found["scroll"] <= 400 and found["images"] == 0 and found["rows"] == 1
