"""What the documentation's build does beyond mkdocs; mkdocs.yml names this file.

Checks links from pages to files outside docs/, which mkdocs cannot see, and points them at the repository.
`mkdocs build --strict` fails on each warning given here.
"""

import logging
import re
from pathlib import Path
from posixpath import normpath

import griffe

LOG = logging.getLogger("mkdocs.plugins.links")
ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
PAGES_OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md", "minisora_jax/bundled/README.md")


def on_pre_build(config):
    """Checks the relative links of the Markdown files outside docs/."""
    for page in PAGES_OUTSIDE:
        for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
            target = match["target"]
            if not re.match(r"\w+:", target) and not (ROOT / page).parent.joinpath(target).exists():
                LOG.warning("%s links to %s, which does not exist", page, target)


def on_page_markdown(markdown, page, config, files):
    """Turns [text](../path) into a link to the repository, or into plain text where mkdocs.yml has no repo_url."""
    folder = Path("docs", page.file.src_uri).parent.as_posix()

    def outside(match):
        path = normpath(f"{folder}/{match['target']}")
        if re.match(r"\w+:", match["target"]) or path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            LOG.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        if not config.repo_url:
            return match["text"]
        return f"[{match['text']}]({config.repo_url.rstrip('/')}/blob/main/{path})"

    return LINK.sub(outside, markdown)


class ExampleSections(griffe.Extension):
    """Reads "Example:" in a docstring as griffe reads "Examples:", so that its lines become code."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
