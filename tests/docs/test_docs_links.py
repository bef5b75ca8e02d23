"""No dead link on any page: files, folders and headings are there."""

from __future__ import annotations

import pytest
from docs_pages import PAGES, ROOT, anchors, links


def test_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "docs/compare.md", "recipes/math/README.md", "bench/schedule/README.md"} <= names
    assert len(links(ROOT / "README.md")) > 10, "or this file tests nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    dead = []
    for target in links(page):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or not path.is_relative_to(ROOT) or (anchor and anchor not in anchors(path)):
            dead.append(target)
    assert not dead


def test_every_page_of_docs_is_linked_from_the_readme_or_another_page():
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in links(page)}
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page not in linked]
