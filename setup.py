"""What pyproject.toml can't say: the README as PyPI shows it, where links into the repository lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup


def without_relative_links(text: str) -> str:
    """[the guide](docs/guide.md) → the guide (docs/guide.md); a link whose text is its path becomes the path."""

    def named(link: re.Match[str]) -> str:
        text, path = link.groups()
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return re.sub(r"\[([^\]]+)\]\((?!https?://)([^)]+)\)", named, text)


readme = without_relative_links((Path(__file__).parent / "README.md").read_text(encoding="utf-8"))
setup(long_description=readme, long_description_content_type="text/markdown")
