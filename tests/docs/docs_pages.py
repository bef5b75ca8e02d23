"""What the pages of the project hold: commands in their bash blocks, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "recipes/*/README.md", "bench/*/README.md")
    for path in ROOT.glob(pattern)
)

COMMANDED = [page for page in PAGES if page.relative_to(ROOT).parts[0] != "bench"]
"""Pages whose commands are executed; what benches cost is said on their pages."""

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.S | re.M)

PLACEHOLDERS = {
    "<your overrides>": "actor_rollout_ref.rollout.name=vllm",
    "main_ppo ... ": "main_ppo actor_rollout_ref.rollout.name=vllm ",
    "MODEL=... ": "MODEL=Qwen/Qwen3-32B ",
}
"""What a reader puts in, and what the tests put in."""


EXAMPLE = re.compile(r"^<!-- example: (\S+) -->\n```\w+\n(.*?)^```", re.S | re.M)
"""A file that a page shows, which its commands name."""


@dataclass(frozen=True)
class Command:
    """A line of a bash block, placeholders filled in: environment in front of it, and its words."""

    page: Path
    text: str
    environment: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text}"


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page's bash blocks, in order; lines that end in a backslash are joined, comments left out."""
    for language, block in FENCE.findall(page.read_text()):
        if language not in ("bash", "sh", "shell", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"(^|\s)#.*", "", line).strip()
            if not text:
                continue
            filled = f"{text} "
            for hole, value in PLACEHOLDERS.items():
                filled = filled.replace(hole, value)
            words = shlex.split(filled)
            environment = {}
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                environment[name] = value
            yield Command(page, text, environment, words)


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    text = FENCE.sub("", page.read_text())
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
