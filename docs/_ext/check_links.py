"""Links of the built site: ``python docs/_ext/check_links.py build/docs`` fails if one leads nowhere.

Sphinx warns of references that it cannot resolve; this also reads what it only copies: links and anchors in the HTML,
pictures, and the places that scripts and menus point to. Addresses of other sites are not opened.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

WITHOUT_ANCHORS = {"genindex.html", "search.html"}


class Page(HTMLParser):
    """What a page points to, and the places in it that can be pointed to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        for name in ("href", "src"):
            if value := found.get(name):
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """``page: link`` for every link inside the site that leads to no file, or to no place in it."""
    files = (path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts)  # those are the theme's
    pages = {path: Page(path.read_text()) for path in files}
    links = [(path, link) for path, page in pages.items() for link in page.links]
    return [f"{path.relative_to(site)}: {link}" for path, link in links if _is_broken(path, link, pages)]


def _is_broken(path: Path, link: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file():
        return True
    anchor = unquote(parts.fragment)
    if not anchor or target not in pages or target.name in WITHOUT_ANCHORS:
        return False
    return anchor not in pages[target].anchors


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    if not (site / "index.html").is_file():
        sys.exit(f"{site} is not a built site.")
    if broken := broken_links(site):
        sys.exit("Links that lead nowhere:\n" + "\n".join(broken))
    print(f"All links inside {site} lead somewhere.")


if __name__ == "__main__":
    main()
