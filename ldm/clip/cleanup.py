"""What OpenAI's CLIP does to a text before it splits it, without the package ftfy that it calls for it.

CLIP's text is ftfy.fix_text(text), unescaped as HTML twice, its white space collapsed, lower-cased. ftfy's plain steps
are here, in its order and with its defaults (version 6.3). Left out is its guess at text that was decoded with the
wrong codec ("cafÃ©" for "café"): such a prompt is taken as it stands.
"""

import html
import re
from html.entities import html5
from unicodedata import normalize

ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
ENTITIES = {f"&{name}": text for name, text in html5.items() if name.endswith(";")}
# Names may be shouted (&EACUTE;) where HTML has no reading of its own for that.
ENTITIES |= {
    name.upper(): text.upper()
    for name, text in ENTITIES.items()
    if name.islower() and html.unescape(name.upper()) == name.upper()
}

C1_CONTROLS = {i: bytes([i]).decode("cp1252", "ignore") or chr(i) for i in range(0x80, 0xA0)}  # as browsers read them
LIGATURES = {ord(c): normalize("NFKC", c) for c in "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"} | {ord("ﬅ"): "ſt"}
WIDTHS = {i: normalize("NFKC", chr(i)) for i in range(0xFF01, 0xFFF0)}  # full and half width
PLAIN = C1_CONTROLS | LIGATURES | WIDTHS
QUOTES = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
TERMINAL_COLOURS = r"\x1b\[[\d;]*[a-zA-Z]"
CONTROLS = r"[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
INVISIBLE = re.compile(f"{TERMINAL_COLOURS}|{CONTROLS}")


def unescape(entity: re.Match[str]) -> str:
    name = entity[0]
    if name.startswith("&#"):
        character = html.unescape(name)
        return name if ";" in character else character  # ";" is left: html could read only a part of the number
    return ENTITIES.get(name, name)


def repair(line: str, entities: bool) -> str:
    before = None
    while line != before:  # what one round uncovers is the next one's: "&amp;amp;", or an entity in full width
        before = line
        if entities:
            line = ENTITY.sub(unescape, line)
        line = line.translate(PLAIN).translate(QUOTES)
        line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # pairs joined, halves U+FFFD
        line = normalize("NFC", INVISIBLE.sub("", line))
    return line


def clean(text: str) -> str:
    """The text that CLIP splits: repaired, one space between words, lower-case."""
    lines = text.split("\n")
    markup = next((i for i, line in enumerate(lines) if "<" in line), len(lines))  # a "<": from there on it may be HTML
    text = "\n".join(repair(line, entities=i < markup) for i, line in enumerate(lines))
    return " ".join(html.unescape(html.unescape(text)).split()).lower()
