"""What the check of the built pages finds."""

from pathlib import Path

import pytest

from docs import check

PAGE = """<html><head><script src="_static/a.js"></script></head><body><article>
<h1 id="top">Title</h1>
{}
</article></body></html>"""


@pytest.fixture
def findings(tmp_path):
    """Makes a page of some HTML, beside one more, and returns what is wrong with it."""

    def look(html: str) -> list[str]:
        (tmp_path / "other.html").write_text(PAGE.format('<p id="there">Text</p>'))
        (tmp_path / "chart.svg").write_text("<svg/>")
        page = tmp_path / "page.html"
        page.write_text(PAGE.format(html))
        check.parsed.cache_clear()
        check.anchors.cache_clear()
        return check.check(page, tmp_path)

    return look


@pytest.mark.parametrize(
    "html",
    [
        r'<span class="math">\(\mu\)</span>',
        r"<pre>$ make docs</pre> <code>\mu</code>",
        '<a href="other.html#there">words</a> <a href="#top">up</a>',
        '<a href="https://docs.jax.dev#nowhere">JAX</a>',
        '<img src="chart.svg" alt="Accuracy by the fraction measured">',
        "<p>**options and 2 * 3 ** 4</p><!-- `hidden` -->",
    ],
)
def test_nothing_is_wrong(findings, html):
    assert findings(html) == []


@pytest.mark.parametrize(
    ("html", "finding"),
    [
        (r"<li>\mu \sum_i g_i</li>", "mathematics that was not read"),
        ("<p>$x$</p>", "mathematics that was not read"),
        (r"<p>\[ x</p>", "mathematics that was not read"),
        ("<p>{py:func}`fold`</p>", "markup that was not read"),
        ("<p>see :class:`Sampler`</p>", "markup that was not read"),
        ("<p>**bold**</p>", "markup that was not read"),
        ("<p>[words](other.md)</p>", "markup that was not read"),
        ('<a href="none.html">words</a>', "link to a file that is not there: none"),
        ('<a href="#none">words</a>', "link to an anchor that is not there: #none"),
        ('<a href="other.html#no">words</a>', "link to an anchor that is not there"),
        ('<img src="chart.svg">', "image without alt text: chart.svg"),
        ('<img src="chart.svg" alt="a/chart.svg">', "image without alt text"),
        ('<script src="https://a.org/b.js"></script>', "script that comes from else"),
    ],
)
def test_something_is_wrong(findings, html, finding):
    (found,) = findings(html)
    assert found.startswith(finding)


def test_links_have_words_where_nothing_builds_the_pages() -> None:
    for path in sorted(Path(check.__file__).parent.glob("**/*.md")):
        assert "[](" not in path.read_text(), path
