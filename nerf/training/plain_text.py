"""Text from elsewhere (file names, prompts, archives, servers, the viewer) as one line of text.

A terminal obeys control characters, a line break forges a line of a log, and bidirectional
overrides show letters in another order. All of these leave the program escaped, as in Python.
"""

import shlex
import unicodedata
from collections.abc import Iterable

# Control characters, halves of characters (file names that are no UTF-8), line and paragraph
# separators, and invisible format characters.
ESCAPED = {"Cc", "Cs", "Zl", "Zp", "Cf"}
KEPT = "\u200c\u200d"  # joiners: spelling in several scripts, and emojis, need them


class _Escapes(dict[int, str]):
    """Character number -> what stands for it, filled when a character is first seen."""

    def __missing__(self, number: int) -> str:
        character = chr(number)
        escaped = unicodedata.category(character) in ESCAPED and character not in KEPT
        shown = character.encode("unicode_escape").decode("ascii") if escaped else character
        return self.setdefault(number, shown)


_escapes = _Escapes()


def one_line(text: object) -> str:
    """``str(text)`` with everything escaped that a terminal or a log would not take for a letter.

    Ordinary text, spaces included, is unchanged. Applied twice, it changes nothing more.
    """
    return str(text).translate(_escapes)


def indented(text: str) -> str:
    """A text of several lines, such as a traceback: ``one_line`` of each, after four spaces.

    So none of them can be taken for a line of a log, which begins with the time.
    """
    return "".join(f"    {one_line(line)}\n" for line in text.rstrip("\n").split("\n"))


def shell_command(words: Iterable[str]) -> str:
    """A command on one line that bash, zsh and ksh take apart into the same words again."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    if one_line(word) == word:
        return shlex.quote(word)
    # $'...' knows escapes. Of a character that is no letter, the bytes are written.
    shown = []
    for character in word:
        if one_line(character) == character:
            shown.append({"\\": "\\\\", "'": "\\'"}.get(character, character))
        else:
            byte_of = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
            code = character.encode("utf-8", byte_of)
            shown += [f"\\{byte:03o}" for byte in code]
    return f"$'{''.join(shown)}'"
