"""Pages that are made from the code, and a hook of mkdocs that adds them to the site.

What stands in a docstring, a recipe, a schema or a parser is never typed again.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import fxquant
import passes
from fxquant import kernels
from fxquant.cli.app import build_parser
from fxquant.kernels.schema import OPERATORS
from fxquant.recipe import Recipe, names
from fxquant.recipe.keys import Table

ROOT = Path(__file__).parents[1]
assert kernels  # the operators are registered on its import


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages that the navigation does not name behind the other guides, under their heading."""
    assert config.nav is not None
    (guides,) = (section["Guides"] for section in config.nav if "Guides" in section)
    named = json.dumps(config.nav)
    for page in sorted((ROOT / "docs").glob("*.md")):
        if f'"{page.name}"' not in named:
            heading = page.read_text(encoding="utf-8").partition("\n")[0]
            guides.append({heading.lstrip("# "): page.name})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of the folder."""
    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links that lead out of the folder: to the page that stands for it here, or to none."""
    markdown = markdown.replace("](../README.md#recipes)", "](reference/recipes.md)")
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


# -- the pages ---------------------------------------------------------------------------------


def recipes() -> str:
    """Named recipes with their TOML, what other names mean, and every key."""
    rows = "\n".join(f"| `{name}` | {about} |" for name, about in names.describe().items())
    files = "\n\n".join(
        f"## {name}\n\n```toml\n{Recipe.named(name).to_toml().rstrip()}\n```"
        for name in names.file_names()
    )
    return "\n\n".join(
        [
            "# Recipes",
            f"| name | |\n| --- | --- |\n{rows}",
            f"```\n{names.grammar()}\n```",
            "## Keys",
            *_keys(Recipe, ""),
            files,
        ]
    )


def _keys(table: type[Table], where: str) -> list[str]:
    """A table of keys, and those of the tables that they hold."""
    default = table() if not where.startswith("overrides") else None
    rows, inner = [], []
    for name, known in table.keys().items():
        dotted = f"{where}{name}"
        if known.table is not None:
            inner += _keys(known.table, f"{dotted}[]." if known.listed else f"{dotted}.")
            continue
        choices = ", ".join(f"`{choice}`" for choice in known.choices())
        value = "" if default is None else f"`{_shown(getattr(default, name))}`"
        rows.append(f"| `{dotted}` | {value} | {_cell(known.meaning)} | {choices} |")
    head = "| key | default | | values |\n| --- | --- | --- | --- |\n"
    return [head + "\n".join(rows), *inner]


def _shown(value: Any) -> str:
    """A default as TOML writes it."""
    return "{}" if value == () else json.dumps(value)


def pass_pages() -> str:
    """Every pass with its docstring: picture, formula, when it declines."""
    parts = [
        "# Passes",
        "What every pass does: the graph before and after, its formula, and when it declines. An "
        "exact pass leaves the outputs as they were up to float rounding, and every compile checks "
        "it.",
    ]
    for kind in all_passes():
        after = ", ".join(f"`{each.name}`" for each in kind.after)
        about = f"`{kind.__module__}.{kind.__qualname__}`; "
        about += "exact" if kind.exact else "not exact: it changes what is computed"
        about += f"; after {after}" if after else ""
        parts += [f"## {kind.name}", about, _docstring(kind)]
    return "\n\n".join(parts)


def all_passes() -> list[type[passes.Pass]]:
    """The classes of both packages that are passes, by name."""
    for package in (passes, fxquant):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found, new = set(), {passes.Pass}
    while new:
        new = {below for kind in new for below in kind.__subclasses__()}
        found |= new
    own = (kind for kind in found if kind.__module__.split(".")[0] in ("passes", "fxquant"))
    return sorted((kind for kind in own if "name" in dir(kind)), key=lambda kind: kind.name)


def operators() -> str:
    """Every operator with its schema and the docstring of what it means."""
    parts = [
        "# Operators",
        "`torch.ops.fxquant.*`: what the integer graph is made of. What they share is in "
        "[integer operations](../integer_operations.md).",
    ]
    for each in sorted(OPERATORS, key=lambda operator: operator.name):
        schema = f"```\nfxquant::{each.name}{each.schema}\n```"
        parts += [f"## {each.name}", schema, _docstring(each.implementation)]
    return "\n\n".join(parts)


def api() -> str:
    """Everything that `import fxquant` offers."""
    parts = ["# API", "All that `import fxquant` offers."]
    for name in sorted(fxquant.__all__, key=str.lower):
        thing = getattr(fxquant, name)
        if isinstance(thing, str):
            continue
        if isinstance(thing, type) and issubclass(thing, Exception):
            parts += [f"## {name}", _docstring(thing)]
            continue
        parts += [f"## {name}", _signature(name, thing), _docstring(thing)]
        if isinstance(thing, type):
            parts += _members(name, thing)
    return "\n\n".join(parts)


def _members(owner: str, kind: type) -> list[str]:
    parts = []
    for name, member in vars(kind).items():
        member = getattr(member, "__func__", member)
        plain = callable(member) and not isinstance(member, type)
        if name.startswith("_") or not (plain or isinstance(member, property)):
            continue
        if not inspect.getdoc(member):
            continue
        call = f"`{owner}.{name}`" if isinstance(member, property) else _signature(name, member)
        parts += [f"### {owner}.{name}", call, _docstring(member)]
    return parts


def command_line() -> str:
    """The help of the command and of each subcommand."""
    parser = build_parser()
    (commands,) = (each for each in parser._actions if isinstance(each.choices, dict))
    parts = ["# Command line", f"```\n{parser.format_help().rstrip()}\n```"]
    for name, command in dict(commands.choices or {}).items():
        parts += [f"## {name}", f"```\n{_wide(command).rstrip()}\n```"]
    return "\n\n".join(parts)


def _wide(command: Any) -> str:
    formatter = command.formatter_class
    command.formatter_class = lambda prog: formatter(prog, width=96)
    return str(command.format_help())


def changes() -> str:
    """CHANGELOG.md, which lies where people look for it."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


PAGES: dict[str, Callable[[], str]] = {
    "reference/recipes.md": recipes,
    "reference/passes.md": pass_pages,
    "reference/operators.md": operators,
    "reference/api.md": api,
    "reference/cli.md": command_line,
    "reference/changes.md": changes,
}


# -- docstrings --------------------------------------------------------------------------------


def _docstring(thing: Any) -> str:
    """A docstring as it stands: its pictures and formulas depend on their columns."""
    text = inspect.getdoc(thing)
    assert text, f"{thing} has no docstring"
    return f"```text\n{text}\n```"


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    shown = f"{name}{signature}"
    if len(shown) > 88:
        lines, star = [], False
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                lines, star = [*lines, "*"], True
            lines.append(str(parameter))
        result = signature.replace(parameters=())
        shown = f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + str(result)[1:]
    return f"```python\n{shown}\n```"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
