"""Checks that links in markdown files and notebooks point to existing files and headings."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
NOT_OURS = {"build", "dist", "sega-jax-out"}
FILES = sorted(
    path
    for ending in ("md", "ipynb")
    for path in ROOT.rglob(f"*.{ending}")
    if not any(part.startswith(".") or part in NOT_OURS for part in path.relative_to(ROOT).parts)
)
LINK = re.compile(r"""\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(?:img|a)\b[^>]*?(?:src|href)=["']([^"']+)""")


def prose(path):
    """Returns a file's markdown without the code blocks."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text):
    """Returns the targets of relative links and pictures, except those inside code spans."""
    targets = (first or second for first, second in LINK.findall(re.sub(r"`[^`\n]*`", "`code`", text)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """Returns the anchors that GitHub generates for the headings in a text."""
    names = []
    for heading in re.findall(r"^#+\s+(.*?)\s*#*$", text, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return names + re.findall(r"""<a\b[^>]*?(?:id|name)=["']([^"']+)""", text)


def broken(path, text):
    for target in links(text):
        name, _, anchor = unquote(target).partition("#")
        other = path.parent / name if name else path
        headings = anchors(text if other == path else prose(other)) if anchor and other.is_file() else [anchor]
        if not other.exists() or anchor not in headings:
            yield target


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_links_lead_somewhere(path):
    assert not list(broken(path, prose(path)))


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, `code`\n\n## Two\n\n## Two\n")
    text = "[a](there.md#a-heading-code) [b](there.md#two-1) ![c](not.png) [d](#nowhere) [e](https://x.y/z) `[f](f.md)`"
    text += ' <img src="no.png" width="10"> [g](there.md#three)\n```\n[h](h.md)\n```\n'
    (tmp_path / "here.md").write_text(text)
    found = list(broken(tmp_path / "here.md", prose(tmp_path / "here.md")))
    assert found == ["not.png", "#nowhere", "no.png", "there.md#three"]
