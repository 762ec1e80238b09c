"""The tutorial says what happens: its blocks run, in order, as a reader would type them."""

import re
from pathlib import Path

import matplotlib
import pytest
from environments import environment, tell

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "tutorial.md").read_text()
    blocks = [(match.start(), match.group(1)) for match in re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)]
    assert len(blocks) > 5
    names: dict[str, object] = {"__name__": "tutorial"}
    for start, block in blocks:
        line = text.count("\n", 0, start) + 1
        exec(compile("\n" * line + block, str(DOCS / "tutorial.md"), "exec"), names)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """As ``make docs`` does, which takes a quarter of a minute of a processor and packages that nothing else needs."""
    python, variables = environment(tmp_path / "venv", "-r", DOCS / "requirements.txt")
    tell(python, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, tmp_path / "site", env=variables)
    pages = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    made = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert pages <= made
    assert "LocalTraining" in (tmp_path / "site/reference/spafl.html").read_text()


@pytest.mark.parametrize("page", sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")))
def test_links_between_pages_and_to_files_lead_somewhere(page):
    path = DOCS / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{page} links to {target}, which is not there"
