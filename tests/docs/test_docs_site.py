"""The site builds without a warning and without the network, holds every page, and its pictures name files that are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT

CONCEPTS, PICTURE = ROOT / "docs" / "concepts.md", ROOT / "docs" / "turn.svg"

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches by itself, by tag; a link that a reader may click is none of it."""


class Loaded(HTMLParser):
    """Addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADS.get(tag, ""))
        if address:
            self.found.append(address)


def mkdocs(repository: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Not with --quiet: that hides warnings from --strict, too."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=repository, capture_output=True, text=True, timeout=180, env=settings)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make site` builds it: a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def built(page: Path) -> str:
    """Where a page of the repository is on the site."""
    path = page.relative_to(ROOT).with_suffix(".html")
    return str(path.with_name("index.html") if path.stem == "README" else path)


def test_every_page_is_there_and_in_the_navigation(site):
    home = (site / "index.html").read_text()
    navigation = re.findall(r'<a href="([^"#]+)" class="md-nav__link', home)
    assert {built(page) for page in PAGES} - {"index.html"} <= set(navigation)
    assert all((site / address).exists() for address in navigation)


def test_nothing_is_loaded_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        assert any(address.endswith(".css") for address in parser.found), "or this test sees nothing"
        assert [address for address in parser.found if re.match(r"(https?:)?//", address)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_links_lead_to_pages_that_lie_outside_of_docs(site):
    links = re.findall(r'href="([^"]+)"', (site / "docs" / "results.html").read_text())
    assert "../bench/residents/index.html" in links, "and not to the file in the repository"


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    """The hook, on a repository of two pages."""
    for name in ("mkdocs.yml", "docs/site/tree.py", "docs/site/site.css"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(re.sub(r"^nav:\n(?:  .*\n)+", "nav: [README.md, docs/one.md]\n", settings.read_text(), flags=re.M))

    def build(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "README.md").write_text("# Home\n\n[one](docs/one.md#a-heading), [a file](docs/site/tree.py)\n")
        (tmp_path / "docs" / "one.md").write_text(text)
        return mkdocs(tmp_path, tmp_path / "site")

    done = build("# One\n\n## A heading\n\n[home](../README.md)\n")
    assert done.returncode == 0 and (tmp_path / "site" / "docs" / "site" / "tree.py").exists(), done.stderr
    failed = build("# One\n\n## Another heading\n\n[gone](../bench/none.md)\n")
    assert failed.returncode == 1 and "'../bench/none.md'" in failed.stderr and "'#a-heading'" in failed.stderr, failed.stderr


def test_the_picture_of_a_turn_names_files_that_are_there():
    text = PICTURE.read_text()
    files = re.findall(r'class="file"[^>]*>([\w/]+\.py)<', text)
    package = ROOT / "verl_heddle"
    assert len(files) >= 8, "or this test sees nothing"
    assert [name for name in files if not (package / name).exists() and not (package / "verl_plugin" / name).exists()] == []
    numbers = re.findall(r"<circle [^>]*/><text [^>]*>(\d+)</text>", text)
    assert numbers == re.findall(r"^(\d+)\. ", CONCEPTS.read_text(), re.M), "each number is explained"
    assert text.count("prefers-color-scheme: dark") == 1


def test_the_concepts_name_files_that_are_there():
    named = re.findall(r"`([\w/]+\.py)`", CONCEPTS.read_text())
    assert named and all((ROOT / "verl_heddle" / name).exists() for name in named)
