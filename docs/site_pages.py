"""Hook of mkdocs: pages of the site that stand above docs/ in the repository, with links that hold in both places.

The home page is README.md. CONTRIBUTING.md, CHANGELOG.md and the files of configs/ are pages and files of the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r'(\]\(|(?:src|srcset|href)=")([^)"#\s]*)')


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root, and the files that pages link to in configs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=LINK.sub(_from_root, text)))
    for file in sorted((ROOT / "configs").rglob("*.*")):
        files.append(File.generated(config, str(file.relative_to(ROOT)), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn the links of docs/ to files above it into links within the site."""
    return LINK.sub(_from_docs, markdown)


def _from_root(found: re.Match[str]) -> str:
    start, target = found.groups()
    return start + PAGES.get(target, target.removeprefix("docs/"))


def _from_docs(found: re.Match[str]) -> str:
    start, target = found.groups()
    above = target.removeprefix("../")
    return start + (PAGES.get(above, above) if above != target else target)
