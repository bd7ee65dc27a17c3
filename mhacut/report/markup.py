"""HTML and SVG put together so that text can never become markup."""

from __future__ import annotations

import html

from mhacut.text import safe

_VOID = frozenset({"br", "input", "link", "meta"})


class Markup(str):
    """Text that is markup already; any other text is escaped when it is put into an element."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element; names of attributes have underscores for dashes, ``class_`` and ``for_`` end in one.

    >>> print(tag("p", "a < b", tag("b", "!"), class_="x", data_n=2))
    <p class="x" data-n="2">a &lt; b<b>!</b></p>

    Args:
        name: of the element.
        children: markup, or text to be escaped.
        attributes: those that are None are left out, those that are True have no value.
    """
    written = []
    for key, value in attributes.items():
        label = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {label}")
        elif value is not None and value is not False:
            written.append(f' {label}="{escaped(value)}"')
    opening = f"<{name}{''.join(written)}>"
    if name in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{join(*children)}</{name}>")


def join(*parts: str) -> Markup:
    """Markup and text, one after another."""
    return Markup("".join(part if isinstance(part, Markup) else escaped(part) for part in parts))


def escaped(text: object) -> str:
    """``text`` as it may stand in an element or a quoted attribute; invisible characters are shown."""
    if isinstance(text, float):
        text = f"{text:.2f}".rstrip("0").rstrip(".")  # coordinates
    return html.escape("\n".join(map(safe, str(text).split("\n"))), quote=True)
