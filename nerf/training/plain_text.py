"""Text from elsewhere (file names, prompts, archives, servers, the viewer) as one line of text.

A terminal obeys control characters, a line break forges a line of a log, and bidirectional
overrides show letters in another order. All of these leave the program escaped, as in Python.
"""

import unicodedata

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


def lines(text: object) -> str:
    """``one_line`` for each line of a text of several lines, such as a table or a traceback."""
    return "\n".join(one_line(line) for line in str(text).split("\n"))
