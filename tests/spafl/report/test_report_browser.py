"""The page in a real browser, where there is one: what no reading of the HTML shows."""

import json
import re
import shutil
import subprocess

import pytest

from spafl.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>
addEventListener("load", () => {
  const right = element => element.getBoundingClientRect().right;
  const found = {
    width: innerWidth,
    scrolls: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    tables: [...document.querySelectorAll("table")].map(table => ({
      right: right(table), cut: table.parentElement.scrollWidth > table.parentElement.clientWidth,
    })),
    images: [...document.images].map(image => ({loaded: image.naturalWidth > 0, right: right(image), alt: image.alt})),
    dead: [...document.querySelectorAll("a[href^='#']")].filter(a => !document.querySelector(a.hash)).length,
  };
  document.title = "found " + JSON.stringify(found);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize(
    "names", [["a run"], [f"spafl-no-exchange-{i} seed 1" for i in range(13)], ["x" * 120, "y" * 120]]
)
def test_everything_is_seen_at_1280_pixels(make_run, tmp_path, monkeypatch, names):
    monkeypatch.setattr("spafl.report.page.DPI", 40)
    page = write_report([make_run(name, name=name, rounds=3) for name in names], tmp_path / "report")
    page.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,1024", "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r"<title>found (.*?)</title>", shown)[1].replace("&gt;", ">").replace("&amp;", "&"))
    assert found["width"] == 1280 and not found["scrolls"] and found["dead"] == 0
    assert found["tables"] and all(not t["cut"] and t["right"] <= 1280 for t in found["tables"])
    assert found["images"] and all(i["loaded"] and i["alt"] and i["right"] <= 1280 for i in found["images"])
