"""Looks for what went wrong in the built pages, without a browser.

Formulas and markup that were not read as such, links and anchors that lead nowhere,
images without words, and scripts or styles that come from elsewhere: the site has to
work from a folder, without a network. What only a browser sees: `screenshots.py`.
"""

import argparse
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag
from bs4.element import PreformattedString

BUILT = Path(__file__).parent / "_build" / "html"
# Where TeX and markup are meant to be seen, or are still to be set by MathJax.
MEANT = {"pre", "code", "script", "style"}
MEANT_CLASSES = {"math", "sig"}
UNREAD = {
    "mathematics": r"\$|\\[a-zA-Z]+|\\[\[\](){}]|\b\w+_\{",
    "markup": r"`|\*\*\S[^*]*\*\*|\]\(|:\w+:|\{\w+(:\w+)?\}|\[\]|^:::|<!--|\.\. \w+::",
}
ELSEWHERE = {"script": "src", "img": "src", "link": "href", "iframe": "src"}


@functools.cache
def parsed(page: Path) -> BeautifulSoup:
    """Reads a page."""
    return BeautifulSoup(page.read_text(), "lxml")


@functools.cache
def anchors(page: Path) -> set[str]:
    """Returns the places of a page that a link can lead to."""
    marked = parsed(page).select("[id], a[name]")
    return {str(tag.get("id") or tag.get("name")) for tag in marked}


def main_part(page: Path) -> Tag:
    """Returns what a page has of its own, without what surrounds all pages."""
    return parsed(page).select_one("article") or parsed(page)


def texts(tag: Tag) -> Iterator[str]:
    """Returns the text of a page piece by piece, without what may look like markup."""
    for child in tag.children:
        if isinstance(child, Tag):
            meant = MEANT_CLASSES.intersection(child.get("class") or [])
            if child.name not in MEANT and not meant:
                yield from texts(child)
        elif not isinstance(child, PreformattedString):  # such as comments
            yield str(child)


def unread(page: Path) -> Iterator[str]:
    """Finds TeX and markup in the text."""
    for text in texts(main_part(page)):
        for what, pattern in UNREAD.items():
            if found := re.search(pattern, text):
                around = text[max(found.start() - 30, 0) : found.end() + 30]
                yield f"{what} that was not read: {' '.join(around.split())!r}"


def broken_links(page: Path, folder: Path) -> Iterator[str]:
    """Finds links into the site that lead nowhere."""
    for tag in main_part(page).select("a[href], img[src]"):
        link = str(tag.get("href") or tag.get("src"))
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.is_relative_to(folder) or not target.is_file():
            yield f"link to a file that is not there: {link}"
        elif parts.fragment and unquote(parts.fragment) not in anchors(target):
            yield f"link to an anchor that is not there: {link}"


def without_words(page: Path) -> Iterator[str]:
    """Finds images that say nothing to those who do not see them."""
    for tag in main_part(page).select("img"):
        words, file = str(tag.get("alt", "")).strip(), str(tag.get("src"))
        if not words or Path(words).name == Path(file).name:
            yield f"image without alt text: {file}"


def from_elsewhere(page: Path) -> Iterator[str]:
    """Finds what a page would load from a network."""
    for name, attribute in ELSEWHERE.items():
        for tag in parsed(page).select(f"{name}[{attribute}]"):
            if urlsplit(url := str(tag[attribute])).netloc:
                yield f"{name} that comes from elsewhere: {url}"


def check(page: Path, folder: Path) -> list[str]:
    """Returns what is wrong with a page."""
    found = [*broken_links(page, folder), *without_words(page), *from_elsewhere(page)]
    if not page.is_relative_to(folder / "_modules"):  # code, and its comments
        found += unread(page)
    return found


def main() -> int:
    """Prints what is wrong with the pages; returns 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=BUILT)
    folder = parser.parse_args().folder.resolve()
    pages = sorted(set(folder.rglob("*.html")) - set(folder.rglob("_static/**/*")))
    if not pages:
        parser.error(f"There are no pages in {folder}. Run `make docs` first.")
    wrong = 0
    for page in pages:
        for finding in check(page, folder):
            print(f"{page.relative_to(folder)}: {finding}")
            wrong += 1
    print(f"{len(pages)} pages, {wrong} to mend")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
