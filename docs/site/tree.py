"""The site's tree is the repository's: a hook of mkdocs, named in mkdocs.yml.

mkdocs reads one folder, but pages lie beside what they describe, and link to each other by the repository's paths. So mkdocs is given the
pages under those paths, and with them every file that one of them links to: the same links work in the repository and on the site, and
`mkdocs build --strict` fails on one that leads nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "recipes/*/README.md",
    "bench/*/README.md",
    "patches/*.md",
    "verl_heddle/data/README.md",
)
STYLE = "docs/site/site.css"

LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages and what they link to in place of the folder that mkdocs has read; the theme's own files stay."""
    root = Path(config.config_file_path).parent
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted({*tree(root)}):
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def tree(root: Path) -> Iterator[Path]:
    """Every file of the site."""
    yield root / STYLE
    for pattern in PAGES:
        for page in root.glob(pattern):
            yield page
            targets = ((page.parent / target).resolve() for target in LINK.findall(page.read_text(encoding="utf-8")))
            yield from (target for target in targets if target.is_file() and target.is_relative_to(root))
