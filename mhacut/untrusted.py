"""Text from files, which is anyone's, made fit to be shown."""

from __future__ import annotations

import unicodedata

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def safe(text: object) -> str:
    r"""``text`` with control, bidi and other invisible characters shown as escapes.

    Names in a checkpoint are anyone's text: printed as they are they can clear the screen, set the window's
    title or turn the reading order. Brackets stay: nothing here is ever parsed as rich markup.

    >>> print(safe("blocks.0\x1b[2J[red]\u202e"))
    blocks.0\x1b[2J[red]\u202e
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ESCAPED else char
        for char in str(text)
    )
