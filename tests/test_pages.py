"""The rendered pages in a real browser: opened from files, offline, on a wide screen and a phone.

`make test` renders the pages and then runs this file on them. By hand: render with `python make.py
test` or `python make.py book`, then `UNIFIED_EDIT_PAGES=_build/html pytest tests/test_pages.py`.

Any Chromium or Chrome that is installed will do; `UNIFIED_EDIT_BROWSER` names another one.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from book_source import BOOK
from checkout import ROOT

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed", exc_type=ImportError
)
axe = pytest.importorskip(
    "axe_playwright_python", reason="axe-playwright-python is not installed", exc_type=ImportError
)

GIVEN = os.environ.get("UNIFIED_EDIT_PAGES")
FOLDER = Path(GIVEN or ROOT / "_build" / "strict" / "_build" / "html").resolve()
PAGES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*.html"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
AXE = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
PHONE = 390
SECONDS = 60_000  # ms that one page may take on a slow machine


def stale() -> str | None:
    """Why the pages cannot be tested; None if they can."""
    index = FOLDER / "index.html"
    if not index.exists():
        return f"no pages in {FOLDER}: python make.py test renders them"
    sources = [path for path in BOOK.rglob("*") if path.is_file()]
    if not GIVEN and max(path.stat().st_mtime for path in sources) > index.stat().st_mtime:
        return "the pages are older than their sources: python make.py test renders them"
    return None


if (reason := stale()) and GIVEN:
    raise FileNotFoundError(reason)
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")
each_page = pytest.mark.parametrize("name", PAGES)


# --- what is in the files -------------------------------------------------------------------------


@dataclass
class Anchors(HTMLParser):
    """Ids, links and files of one page."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "source") and "src" in given:
            self.files.append(given["src"])
        elif tag == "link" and given.get("rel") in (
            "stylesheet",
            "preload",
            "icon",
            "next",
            "prev",
        ):
            self.files.append(given["href"])


@functools.cache
def anchors(path: Path) -> Anchors:
    """What stands in an HTML file."""
    parser = Anchors()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def dead(page: Path, target: str) -> str | None:
    """Why a link of `page` leads nowhere; None if it does, or leaves the book."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https", "mailto", "data", "javascript"):
        return None
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if parts.scheme or not path.is_file():
        return f"{target}: no such file"
    anchor = unquote(parts.fragment)
    if anchor and path.suffix == ".html" and anchor not in anchors(path).ids:
        return f"{target}: no such place in {path.name}"
    return None


@each_page
def test_links_lead_somewhere(name: str) -> None:
    page = FOLDER / name
    found = anchors(page)
    assert [fault for link in found.links if (fault := dead(page, link))] == []
    assert [fault for file in found.files if (fault := dead(page, file))] == []
    outside = [file for file in found.files if urlsplit(file).scheme in ("http", "https")]
    assert outside == [], "the page needs the network"


# --- in the browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that is installed; the tests are skipped, and say why, if none can be started."""
    named = os.environ.get("UNIFIED_EDIT_BROWSER")
    paths = [named] if named else [path for name in NAMES if (path := shutil.which(name))]
    ways: list[dict[str, Any]] = [{"executable_path": path} for path in paths]
    if not named:
        ways += [{"channel": "chrome"}, {"channel": "msedge"}, {}]  # their usual places
    with playwright_api.sync_playwright() as driver:
        problems = []
        for way in ways:
            try:
                started = driver.chromium.launch(**way)
            except playwright_api.Error as problem:
                problems.append(f"{way or 'own'}: {str(problem).splitlines()[0]}")
                continue
            yield started
            started.close()
            return
        pytest.skip("no Chromium or Chrome could be started: " + "; ".join(problems))


@dataclass
class Visit:
    """An open page, and what went on while it opened."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def visit(browser: Any, name: str, scheme: str) -> Iterator[Visit]:
    """Open a page from its file, without a network, and wait until its equations are set."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": 1280, "height": 900}, reduced_motion="reduce"
    )
    context.set_default_timeout(SECONDS)
    here = Visit(context.new_page())

    def handle(route: Any) -> None:
        url = route.request.url
        if urlsplit(url).scheme in ("file", "data", "blob"):
            route.continue_()
        else:
            here.requests.append(url)
            route.abort()

    def listen(message: Any) -> None:
        if message.type in ("error", "warning"):
            here.complaints.append(message.text)

    context.route("**/*", handle)
    here.page.on("console", listen)
    here.page.on("pageerror", lambda error: here.complaints.append(str(error)))
    here.page.goto((FOLDER / name).as_uri(), wait_until="load")
    here.page.wait_for_load_state("load")
    here.page.evaluate("window.MathJax?.startup?.promise?.then(() => true)")
    yield here
    context.close()


@pytest.fixture(scope="module")
def light(browser: Any, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A page of the book in light colours; one visit for all tests of it."""
    yield from visit(browser, request.param, "light")


@pytest.fixture(scope="module")
def dark(browser: Any, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """The same in dark colours."""
    yield from visit(browser, request.param, "dark")


SHOWN = [name for name in PAGES if name != "index.html"]
in_light = pytest.mark.parametrize("light", SHOWN, indirect=True)
CHAPTERS = [name for name in PAGES if (BOOK / name).with_suffix(".ipynb").exists()]
#: Chapters have one style sheet, and colours of long pages take long: two of them stand for all, a
#: plain one and one with a slider, but for the weekly run.
FOR_ALL = ("a_fact.html", "objective.html")
EACH_WEEK = os.environ.get("UNIFIED_EDIT_SLOW") == "1"
COLOURS = [name for name in SHOWN if EACH_WEEK or name in FOR_ALL or name not in CHAPTERS]
in_dark = pytest.mark.parametrize("dark", COLOURS, indirect=True)


@in_light
def test_a_page_opens_without_a_network_and_without_a_complaint(light: Visit) -> None:
    assert light.requests == []
    assert light.complaints == []
    assert light.page.title()


RAW = r"""() => {
  const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (/\\\(|\\\[|\\begin\{|\$\$/.test(node.data)
        && !node.parentElement.closest('pre, code, script, mjx-container, .highlight')) {
      found.push(node.data.trim().slice(0, 80));
    }
  }
  return found;
}"""


@in_light
def test_every_equation_is_set(light: Visit) -> None:
    bare = light.page.eval_on_selector_all(
        ".math",
        "all => all.filter(e => !e.querySelector('mjx-container') && !e.closest('mjx-container'))"
        ".map(e => e.textContent.slice(0, 80))",
    )
    assert bare == []
    wrong = light.page.eval_on_selector_all(
        # An unknown command is no error to MathJax: it shows its name in red.
        "mjx-merror, mjx-container [data-mjx-error], mjx-mtext[style*='red']",
        "all => all.map(e => e.closest('mjx-container').querySelector('mjx-assistive-mml')"
        "?.textContent ?? e.textContent)",
    )
    assert wrong == []
    assert light.page.evaluate(RAW) == []


@in_light
def test_every_image_is_there_and_has_a_text_of_its_own(light: Visit) -> None:
    images = light.page.eval_on_selector_all(
        "img", "all => all.map(e => [e.getAttribute('src'), e.alt, e.naturalWidth])"
    )
    for source, text, width in images:
        assert width > 0, f"{source} cannot be shown"
        name = Path(source).name
        assert text.strip(), f"{name} has no alt text"
        assert not text.startswith("_images") and name not in text, f"{name}: alt text is its name"


@in_light
def test_there_is_one_first_heading(light: Visit) -> None:
    if light.page.url.endswith("/search.html"):
        pytest.skip("its heading is made by the theme")
    headings = light.page.eval_on_selector_all(
        ".bd-article h1", "all => all.map(e => e.textContent)"
    )
    assert len(headings) == 1


CHECK = """async (rules) => {
  for (const title of document.querySelectorAll('details:not([open]) > summary')) title.click();
  for (const title of document.querySelectorAll('.toggle-hidden > .admonition-title')) {
    title.click();
  }
  if (document.querySelector('.toggle-hidden')) throw Error('something is still folded');
  await new Promise(done => setTimeout(done, 500));  // the theme looks for what scrolls
  const result = await axe.run(document, {
    preload: false,
    resultTypes: ['violations'],
    runOnly: rules,
  });
  return result.violations
    .filter(v => v.impact === 'serious' || v.impact === 'critical')
    .map(v => `${v.id}: ${v.help}: ` + v.nodes.slice(0, 5).map(
      n => n.target.join(' ') + (n.any[0] ? ` (${n.any[0].message})` : '')).join('; '));
}"""


ALL_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


def serious_findings(page: Any, rules: list[str]) -> list[str]:
    """What axe finds with everything unfolded."""
    page.evaluate(AXE)
    found: list[str] = page.evaluate(CHECK, rules)
    return found


@in_light
def test_axe_finds_nothing_serious_in_light(light: Visit) -> None:
    assert light.page.evaluate("document.documentElement.dataset.theme") == "light"
    assert serious_findings(light.page, ALL_RULES) == []


WIDE = """width => {
  const found = [];
  for (const e of document.querySelectorAll('main *')) {
    const box = e.getBoundingClientRect();
    if (box.width > 0 && box.right > width + 1 && box.left < width) {
      found.push(`${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 40)}`);
    }
  }
  return found.slice(0, 8);
}"""


@in_light
def test_nothing_is_wider_than_a_phone(light: Visit) -> None:
    """Last of the light ones: it changes the size of the window. Everything is unfolded by now."""
    light.page.set_viewport_size({"width": PHONE, "height": 844})
    light.page.wait_for_timeout(200)
    width = light.page.evaluate(
        "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    )
    assert width <= PHONE, light.page.evaluate(WIDE, PHONE)


@in_dark
def test_axe_finds_nothing_serious_in_dark(dark: Visit) -> None:
    """Colours only: the rest of the page is the same."""
    assert dark.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert serious_findings(dark.page, ["color-contrast"]) == []


@pytest.mark.parametrize("light", CHAPTERS, indirect=True)
def test_a_chapter_can_be_taken_along_and_says_how_it_was_run(light: Visit) -> None:
    links = light.page.eval_on_selector_all(
        "header a, .bd-header-article a", "a => a.map(e => e.href)"
    )
    notebook = Path(urlsplit(light.page.url).path).stem
    for place in ("colab.research.google.com", "mybinder.org", f"_sources/{notebook}.ipynb"):
        assert [link for link in links if place in link], place
    line = light.page.text_content(".executed-with")
    assert line.startswith("Executed on ")
    for name in ("Python", "torch", "transformers", "unified_edit"):
        assert f"{name} " in line


SLIDERS = [name for name in PAGES if 'class="ue-slider"' in (FOLDER / name).read_text("utf-8")]


@pytest.mark.parametrize("light", SLIDERS, indirect=True)
def test_a_slider_shows_the_picture_of_its_state(light: Visit) -> None:
    boxes = light.page.locator(".ue-slider")
    for place in range(boxes.count()):
        box = boxes.nth(place)
        handle, pictures = box.locator("input"), box.locator("img")
        last = pictures.count() - 1
        for key, shown in (("Home", 0), ("ArrowRight", 1), ("End", last)):
            handle.press(key)
            seen = [pictures.nth(index).is_visible() for index in range(last + 1)]
            assert seen == [index == shown for index in range(last + 1)]
            name = pictures.nth(shown).get_attribute("data-state")
            assert box.locator("output").text_content() == name
            assert handle.get_attribute("aria-valuetext") == name
    light.page.emulate_media(media="print")
    assert not any(boxes.nth(place).is_visible() for place in range(boxes.count()))
    light.page.emulate_media(media="screen")


def test_the_first_page_leads_to_the_introduction(browser: Any) -> None:
    page = browser.new_page()
    page.goto((FOLDER / "index.html").as_uri(), wait_until="commit")
    page.wait_for_url("**/intro.html")
    page.close()


def test_search_finds_pages_without_a_network(browser: Any) -> None:
    for here in visit(browser, "search.html", "light"):
        here.page.goto((FOLDER / "search.html").as_uri() + "?q=Eiffel")
        here.page.wait_for_selector("#search-results li a")
        links = here.page.eval_on_selector_all("#search-results li a", "a => a.map(e => e.href)")
        assert any("first_edit.html" in link for link in links)
        assert here.requests == []
