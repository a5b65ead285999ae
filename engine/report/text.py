"""Text from a corpus made showable: no control characters, no markup that acts, cut to a size."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

_MARKUP = re.compile(r"[\\`*_\[\]|~$]|^[#>+=-](?=[\s#>=-]|$)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
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


def markdown(value: Any) -> Any:
    """A printed value in Markdown: text on one line, with everything escaped that Markdown or HTML would read."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = " ".join(clean(value).split())
    line = _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", line))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("://", ":\u200b//")


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
