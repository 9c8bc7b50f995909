"""Hooks of mkdocs: one page per public package, and the pages and examples that are kept beside docs/.

The build ends with an error where a public name has no docstring.
"""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from public_names import PACKAGES, SOURCE, dotted, public_names, undocumented

ROOT = SOURCE.parent
BESIDE = (
    *("CONTRIBUTING.md", "CHANGELOG.md", "RELEASING.md", "SECURITY.md"),
    *(f"examples/{path.name}" for path in sorted(ROOT.glob("examples/*.py"))),
)
HEAD = """# {title}

::: {module}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      members: []
"""
ENTRY = """
[](){{ #{module}.{name} }}

::: {path}
    options:
      heading: {title}.{name}
      toc_label: {name}
"""


def on_config(config: Any) -> Any:
    """Check the docstrings, and append the generated pages to the navigation."""
    lacking = undocumented()
    if lacking:
        raise PluginError(f"public names without a docstring: {', '.join(lacking)}")
    config.nav.append({"Reference": [{_title(package): _place(package)} for package in PACKAGES]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/."""
    for name in BESIDE:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    for package in PACKAGES:
        files.append(File.generated(config, _place(package), content=_page(package)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to what is kept beside docs/ at its copy."""
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, BESIDE))})", r"](\1", markdown)


def _title(package: str) -> str:
    return "kk" if package == "karikomi" else f"kk.{package}"


def _place(package: str) -> str:
    return f"reference/{package}.md"


def _page(package: str) -> str:
    module, title = dotted(package), _title(package)
    entries = [
        ENTRY.format(module=module, name=entry.name, path=entry.path, title=title)
        for entry in public_names(module)
    ]
    return HEAD.format(module=module, title=title) + "".join(entries)
