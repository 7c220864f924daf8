"""What the site needs beyond docs/: pages that live at the repository's root, and pictures from bench/results."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Where a page of the site comes from, and what its links are called there.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./)?((?:bench|tests|inilora_kernels)/[^)#]*)(#[^)]*)?\)")
_RESULTS = "bench/results/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_at_the_root(ROOT / source)))
    files.append(File.generated(config, "example.md", content=_notebook(ROOT / "docs/example.ipynb")))
    for picture in sorted((ROOT / _RESULTS).rglob("*.png")):
        files.append(File.generated(config, str(picture.relative_to(ROOT)), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Pictures come along; other links into the repository become the path, which a reader of the site can look up."""

    def outside(link: re.Match[str]) -> str:
        picture, text, _, path, _ = link.groups()
        if picture:  # a click shows it at its full size
            return f"[![{text}]({path})]({path})"
        if path.endswith(".png"):
            return f"[{text}]({path})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return _LINK.sub(outside, markdown).replace("<!-- options -->", _options_table())


def _notebook(source: Path) -> str:
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts)


def _options_table() -> str:
    """Every option, read from the one place where they stand."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    tree = ast.parse((ROOT / "inilora_kernels/options.py").read_text(encoding="utf-8"))
    for field in ast.walk(tree):
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call):
            default, meaning = field.value.args
            text = ast.literal_eval(meaning).replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")
            rows.append(f"| `{ast.unparse(field.target)}` | `{ast.unparse(default)}` | {text} |")
    return "\n".join(rows)


def _at_the_root(source: Path) -> str:
    """A page's text with its links as the site calls them."""
    text = source.read_text(encoding="utf-8").replace("](docs/", "](")
    for page, original in PAGES.items():
        text = text.replace(f"]({original})", f"]({page})").replace(f"]: {original}", f"]: {page}")
    return text
