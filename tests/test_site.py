"""The built site, as a reader without a network opens it from their disk."""

import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("[0-9][0-9]_*.md"))
LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from the stored outputs, every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [f"{sys.prefix}/bin/jupyter-book", "build", ROOT / "book"]
    command += ["--config", ROOT / "_config.yml", "--path-output", folder]
    command += ["-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_build" / "html"


class Page(HTMLParser):
    """The ids of a page, where it links to, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADING and LOADING[tag] in values:
            self.loads.append(values[LOADING[tag]])


def test_every_chapter_has_a_page(site: Path):
    assert CHAPTERS
    for name in ["index", *CHAPTERS]:
        assert (site / f"{name}.html").is_file()


def test_no_link_is_dead(site: Path):
    pages = {path: Page(path) for path in site.glob("*.html")}
    checked = 0
    for path, page in pages.items():
        for link in page.links + page.loads:
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = path
            if address.path:
                target = (path.parent / urllib.parse.unquote(address.path)).resolve()
            assert target.exists(), f"{path.name} links to {link}, which is not there"
            if address.fragment and target in pages:
                ids = pages[target].ids
                name = urllib.parse.unquote(address.fragment)
                assert name in ids, (
                    f"{path.name} links to {link}, which has no such part"
                )
            checked += 1
    assert checked > 100


def test_nothing_is_loaded_from_the_network(site: Path):
    for path in site.glob("*.html"):
        for address in Page(path).loads:
            assert "//" not in address.split("?")[0], f"{path.name} loads {address}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine, so no page was opened")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


BARE_FORMULAS = """
[...document.querySelectorAll('.math')]
    .filter(formula => !formula.querySelector('mjx-container')).map(e => e.innerText)
"""
SCROLLING = """
[...document.querySelectorAll('.cell_input pre')]
    .filter(pre => pre.scrollWidth > pre.clientWidth).map(pre => pre.innerText)
"""
# Moves each control of each explorer, and reports those that changed nothing.
MOVE = """
(async () => {
  const seen = box => box.innerHTML + [...box.querySelectorAll("canvas")]
    .map(canvas => canvas.toDataURL()).join();
  const dead = [];
  let moved = 0;
  for (const box of document.querySelectorAll(".explorer")) {
    for (const control of box.querySelectorAll("input, select, button")) {
      const before = seen(box);
      if (control.tagName === "BUTTON" || /checkbox|radio/.test(control.type)) {
        control.click();
      } else {
        if (control.tagName === "SELECT") {
          control.selectedIndex = (control.selectedIndex + 1) % control.options.length;
        } else if (control.type === "range") {
          control.value = control.value === control.max ? control.min : control.max;
        } else {
          control.value = control.value + " 7";
        }
        control.dispatchEvent(new Event("input", {bubbles: true}));
        control.dispatchEvent(new Event("change", {bubbles: true}));
      }
      await new Promise(done => setTimeout(done, 100));
      moved += 1;
      if (seen(box) === before) dead.push(control.outerHTML);
    }
  }
  const all = [...document.querySelectorAll(".cell_output input, .cell_output select")];
  const stray = all.filter(e => !e.closest(".explorer")).map(e => e.outerHTML);
  return {moved, dead, stray, boxes: document.querySelectorAll(".explorer").length};
})()
"""


@pytest.mark.parametrize("name", ["index", *CHAPTERS])
def test_page_opens_in_a_browser(site: Path, browser: Browser, name: str):
    browser.open((site / f"{name}.html").as_uri())
    assert browser.complaints == []
    strangers = [
        url for url in browser.requests if not url.startswith(("file:", "data:"))
    ]
    assert strangers == []
    assert browser.evaluate(BARE_FORMULAS) == []
    assert browser.evaluate(SCROLLING) == [], "code is wider than the page"


@pytest.mark.parametrize("name", CHAPTERS)
def test_explorers_move(site: Path, browser: Browser, name: str):
    browser.open((site / f"{name}.html").as_uri())
    result = browser.evaluate(MOVE)
    if name == "08_generation":
        assert result["boxes"] >= 1, "temperature and top-p have an explorer"
    assert result["dead"] == []
    assert result["stray"] == [], 'put them into an element of class "explorer"'
    assert result["moved"] >= result["boxes"]
    assert browser.complaints == []
