"""What the site adds to docs/: pages that lie elsewhere in the repository, and links that follow them."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # where a page lies in the repository -> where it stands in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "refine_kernels/README.md": "kernels/index.md",
    **{
        f"refine_kernels/{op}/README.md": f"kernels/{op}.md"
        for op in ("delta_rule", "lact", "linear_logprob")
    },
    "refine/assets/tiny-delta-net/README.md": "tiny_delta_net.md",
}


def on_files(files: Files, config) -> Files:
    """Add the pages from outside docs/."""
    for source, place in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # a model card's header
        files.append(File.generated(config, place, content=_moved(text, source, place)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Let the links of a page of docs/ follow the pages that were moved."""
    place = page.file.src_uri
    return markdown if place in PAGES.values() else _moved(markdown, f"docs/{place}", place)


def on_page_content(html: str, page, config, files) -> str:
    """Leave out the roles of docstrings, as in :func:`name`."""
    return re.sub(r":(?:class|func|meth|mod|attr):(<code>)~?", r"\1", html)


def _moved(text: str, source: str, place: str) -> str:
    """A page's text with its relative links as they have to be at its place; a file that is no page of the site is
    named without a link."""

    def moved(match: re.Match) -> str:
        whole, mark, label, target = match[0], match[1], match[2], match[3]
        path, hash_, heading = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return whole
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if there in PAGES:
            there = PAGES[there]
        elif there.startswith("docs/"):
            there = there.removeprefix("docs/")
        else:
            return f"{label} (`{there}`)" if there not in label else label
        return f"{mark}[{label}]({os.path.relpath(there, posixpath.dirname(place) or '.')}{hash_}{heading})"

    link = r"(!?)\[([^\]]*)\]\(([^)\s]+)\)"
    pieces = re.split(r"(```.*?```)", text, flags=re.S)  # code stays as it is
    return "".join(piece if piece.startswith("```") else re.sub(link, moved, piece) for piece in pieces)
