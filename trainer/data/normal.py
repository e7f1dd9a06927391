"""One way to write the same text: Unicode NFC, \\n line ends, no invisible signs, no space at line ends or around it. Pure."""

import re
import unicodedata

# Byte order marks, zero-width spaces, soft hyphens and control characters; joiners stay, since scripts and emoji need them.
INVISIBLE = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u00ad\u200b\u2060\ufeff]")
_LINE_END = re.compile(r"[^\S\n]+\n")


def normalise(text: str) -> str:
    """Idempotent."""
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not (text.isascii() and text.isprintable()):
        text = INVISIBLE.sub("", text)
        text = unicodedata.normalize("NFC", _LINE_END.sub("\n", text))  # signs that stood apart may combine now
    return text.strip()
