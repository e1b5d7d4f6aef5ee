"""The site: `make docs` builds it into build/docs, with warnings as errors and nothing loaded from outside."""

import re
from typing import Any

from impure_fast import __version__

project, author, release = "impure_fast", "The impure_fast maintainers", __version__
extensions = ["sphinx.ext.autodoc", "myst_parser"]
myst_heading_anchors = 3
linkcheck_ignore = [r"http://(127\.0\.0\.1|localhost)"]  # what a reader starts himself
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = html_show_sourcelink = html_show_copyright = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"

ITEM = re.compile(r"([a-z_][\w, .]*(?: \(options\))?): ")


def docstring_as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The package's docstrings as reStructuredText, in place: "name: text" lines as a list, indented text as it is."""
    found: list[str] = []
    listed = code = False  # what the line before belongs to
    for line in lines:
        blank, indented = not line.strip(), line.startswith("    ")
        if indented and not listed and not code and found and not found[-1]:
            found += ["::", ""]
            code = True
        code = code and (blank or indented)
        if code or blank:
            listed = listed and not blank
            found.append(line)
            continue
        if not indented and (item := ITEM.match(line)):
            if not listed:
                found.append("")
            line, listed = f"* **{item[1]}**: {_escaped(line[item.end() :])}", True
        elif listed and not indented and re.match(r"[A-Z]|->", line):
            found.append("")
            line, listed = _escaped(line), False
        else:
            line = ("  " if listed else "") + _escaped(line.strip())
        found.append(line)
    lines[:] = found


def _escaped(text: str) -> str:
    """Outside ``literals`` no character marks anything up."""
    parts = text.split("``")
    parts[::2] = [re.sub(r"([*|`]|_\b)", r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", docstring_as_rst)
