"""The report in a real browser: phone and desktop, light and dark, and with a response that attacks the page."""

import shutil
from pathlib import Path

import pytest
from cluster.requirements import not_here
from test_package_phase import ATTACK, little_run, packaged  # noqa: F401 - fixtures

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        not_here("Chromium is missing: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """``visit(path, width, scheme) -> (page, requests, console messages)``."""
    pages = []

    def go(path: Path, width: int = 1280, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        pages.append(page)
        requests, said = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        page.goto(path.as_uri())
        return page, requests, said

    yield go
    for page in pages:
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_fetched_said_or_cut_off(packaged, visit, width, scheme):  # noqa: F811
    page, requests, said = visit(packaged[0] / "report.html", width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert requests == [(packaged[0] / "report.html").as_uri()]
    assert said == []
    assert page.locator("figure svg").count() >= 6
    # Text and paper differ as they should in both schemes.
    assert page.evaluate(CONTRAST) > 7


def test_a_response_is_shown_and_not_run(packaged, visit):  # noqa: F811
    page, _, said = visit(packaged[0] / "report.html")
    assert page.title() == "A & B"
    assert said == []
    assert page.locator(".sample pre", has_text=ATTACK).first.is_visible()
    assert page.locator("script, img").count() == 0


def test_every_link_has_its_place(packaged, visit):  # noqa: F811
    page, _, _ = visit(packaged[0] / "report.html")
    targets = page.eval_on_selector_all("a[href^='#']", "links => links.map(a => a.getAttribute('href').slice(1))")
    assert targets
    assert all(page.locator(f"[id='{target}']").count() == 1 for target in targets)
    ids = page.eval_on_selector_all("[id]", "found => found.map(e => e.id)")
    assert len(ids) == len(set(ids))


CONTRAST = """() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const style = getComputedStyle(document.body);
  const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
}"""
