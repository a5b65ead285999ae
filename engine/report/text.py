"""Text from a corpus made showable: no control characters, no lone surrogates, cut to a size."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with C0 controls as their pictures (␀).

    C1 controls, lone surrogates and overrides of the reading direction become U+FFFD.
    """
    return _CONTROL.sub(_picture, text.replace("\r\n", "\n").replace("\r", "\n"))


def cut(text: str, size: int) -> str:
    """At most `size` bytes of UTF-8, an ellipsis where something is missing."""
    data = text.encode()
    return text if len(data) <= size else data[:size].decode(errors="ignore") + "…"


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
