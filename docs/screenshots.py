"""Looks at the built pages in a browser, wide and narrow, light and dark.

Takes a picture of each, and finds what is cut off or sticks out, formulas that MathJax
could not set, and what a page tried to load from elsewhere. Needs Chromium, and
Playwright to drive it: `make screenshots`.
"""

import argparse
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from check import BUILT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Keep to the site, whoever runs this: no sandbox as root, no calls home.
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
# Runs in the page. A narrow page may scroll tables, formulas and code; a wide one code.
FIND = r"""
(narrow) => {
  const found = [];
  const name = (e) => {
    const text = (e.innerText || e.alt || "").replace(/\s+/g, " ").trim();
    return `${e.tagName.toLowerCase()}.${[...e.classList].join(".")} ` +
      `"${[...text].slice(0, 60).join("")}"`;
  };
  const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const may_scroll = (e) =>
    e.matches(narrow ? "pre, table, .math, mjx-container, div" : "pre");
  const article = document.querySelector(".bd-article") || document.body;
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) found.push("the page is too wide");
  const frame = article.closest(".bd-article-container");
  if (frame && frame.scrollWidth > frame.clientWidth + 1)
    found.push(`the text is too wide by ${frame.scrollWidth - frame.clientWidth} px`);
  const contents = document.querySelectorAll(".bd-sidebar-secondary *");
  for (const e of [...article.querySelectorAll("*"), ...contents]) {
    if (e.closest("svg, mjx-assistive-mml") || !e.offsetParent) continue;
    const over = e.scrollWidth - e.clientWidth;
    const style = getComputedStyle(e);
    if (e.clientWidth && over > 1 && style.overflowX !== "visible") {
      if (!scrolls(e)) found.push(`cut off by ${over} px: ${name(e)}`);
      else if (!may_scroll(e)) found.push(`scrolls by ${over} px: ${name(e)}`);
    }
    let around = e.parentElement;
    while (around && around !== frame && !scrolls(around))
      around = around.parentElement;
    const sticks_out = e.getBoundingClientRect().right > width + 1;
    if (sticks_out && !e.children.length && (around === frame || !narrow))
      found.push(`sticks out: ${name(e)}`);
  }
  for (const e of document.querySelectorAll("mjx-merror"))
    found.push(`not set: ${e.innerText || e.dataset.mjxError}`);
  if (document.querySelector(".math") && !document.querySelector("mjx-container"))
    found.push("no formula is set");
  for (const e of document.images)
    if (e.offsetParent && e.complete && !e.naturalWidth)
      found.push(`does not load: ${e.src}`);
  return found;
}
"""


def look_at(
    tab: Any, page: Path, width: int, pictures: dict[str, Path]
) -> Iterator[str]:
    """Opens a page, takes a picture a scheme, and says what is wrong with what it sees.

    Args:
      tab: of the browser.
      page: the file.
      width: of the window.
      pictures: where to put that of each scheme of colours.
    """
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(page.as_uri())
    tab.evaluate("() => window.MathJax?.startup?.promise")
    for scheme, picture in pictures.items():
        tab.emulate_media(color_scheme=scheme)
        tab.screenshot(path=picture, full_page=True)
    yield from tab.evaluate(FIND, width < 800)
    for url in asked:
        if not url.startswith(("file:", "data:")):
            yield f"asks a network for {url}"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("pages", nargs="*", help="such as api/linen; by default all but source code")
    add("--folder", type=Path, default=BUILT, help="the built pages")
    add("--out", type=Path, default=BUILT.parent / "screenshots", help="for pictures")
    add("--widths", nargs="+", type=int, default=[1280, 390], help="in pixels")
    add("--schemes", nargs="*", default=["light", "dark"], help="or none")
    add("--browser", help="its program; by default Chromium's or Chrome's")
    return parser.parse_args()


def main() -> int:
    """Prints what is wrong; returns 1 if anything is, 0 without a browser, too."""
    args = parse()
    browser = args.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("Skipped: no Playwright. `pip install playwright` brings it.")
        return 0
    if browser is None:
        print(f"Skipped: no browser, none of {', '.join(BROWSERS)}. Install Chromium.")
        return 0
    folder = args.folder.resolve()
    if not folder.is_dir():
        print(f"There are no pages in {folder}. Run `make docs` first.")
        return 1
    names = args.pages or [
        str(page.relative_to(folder).with_suffix(""))
        for page in sorted(folder.rglob("*.html"))
        if page.relative_to(folder).parts[0] not in ("_modules", "_static")
    ]
    wrong = 0
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=QUIET)
        for name, width in itertools.product(names, args.widths):
            pictures = {
                scheme: args.out / f"{name}-{width}-{scheme}.png"
                for scheme in args.schemes
            }
            tab = chromium.new_page(offline=True)
            for finding in look_at(tab, folder / f"{name}.html", width, pictures):
                print(f"{name}, {width} px: {finding}", flush=True)
                wrong += 1
            tab.close()
        chromium.close()
    print(f"{len(names)} pages, {wrong} to mend")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
