"""The report of a run as a browser shows it: nothing is fetched, nothing overflows, text can be read in the dark."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fastft.cli import main
from fastft.engine.trainer import Trainer
from tests.engine.test_run import ok

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NARROW, WIDE = 390, 1280
# The least contrast of text on its ground, WCAG 2.2 level AA.
LEAST_CONTRAST = 4.5


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox refuses to be root, as a container's user often is.
        sandbox = os.geteuid() != 0
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS, chromium_sandbox=sandbox)
        yield browser
        browser.close()


CONTRASTS = """() => {
  const channel = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const probe = document.createElement("div"); probe.style.background = "Canvas"; document.body.append(probe);
  const ground = rgba(getComputedStyle(probe).backgroundColor); probe.remove();
  const opacity = e => e ? +getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
  const found = [];
  for (const e of document.querySelectorAll("h1,h2,h3,p,a,dt,dd,td,th,li,summary,figcaption,text")) {
    if (!e.textContent.trim()) continue;
    const style = getComputedStyle(e), color = rgba(e.tagName == "text" ? style.fill : style.color), a = opacity(e);
    const shown = [0, 1, 2].map(i => a * color[i] + (1 - a) * ground[i]);
    const [low, high] = [luminance(shown), luminance(ground)].sort((x, y) => x - y);
    found.push([e.textContent.slice(0, 40), (high + 0.05) / (low + 0.05)]);
  }
  return found;
}"""


def look_at(browser, path: Path, *, width: int, scheme: str) -> int:
    """Open a page as a user would; returns how many pictures it has."""
    said, asked = [], []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    if folder := os.environ.get("FASTFT_SCREENSHOTS"):  # to look at them
        name = f"{path.parent.name}-{path.stem}-{width}-{scheme}.png"
        page.screenshot(path=Path(folder) / name, full_page=True)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [svg.bounding_box() for svg in page.locator("svg").all()]
    assert all(box["width"] > 200 and box["height"] > 100 for box in boxes)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert min(contrast for _, contrast in contrasts) >= LEAST_CONTRAST, sorted(contrasts, key=lambda c: c[1])[:3]
    context.close()
    return len(boxes)


def test_reports_in_a_browser(browser, base_config, launch, monkeypatch, tmp_path):
    """Of a run that is profiled and evaluated between its steps, of its rank, of one that fails, and of both runs."""
    raw = base_config(train={"steps": 6, "eval_every": 2, "batch_size": 8}, data={"control_documents": 0})
    raw["evaluate"]["answers"] = False
    raw |= {"profile": {"steps": 2, "wait": 1}, "output_dir": str(tmp_path / "complete")}
    ok(launch(raw))
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, n, *rest: step(self, n, *rest) if n < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch(raw | {"output_dir": str(tmp_path / "failed")})
    assert main(["report", str(tmp_path / "complete"), str(tmp_path / "failed"), "--out", str(tmp_path / "both")]) == 0
    pages = {"complete/report": 8, "complete/profile/rank_0": 2, "failed/report": 5, "both/report": 5}
    for name, fewest in pages.items():
        for width, scheme in ((NARROW, "dark"), (WIDE, "light")):
            assert look_at(browser, tmp_path / f"{name}.html", width=width, scheme=scheme) >= fewest
