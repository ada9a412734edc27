"""What a text needs before it goes into Markdown, LaTeX, CSV, a figure or a shell command.

Texts come from records, which are untrusted. Each function takes any text and returns one that the
format shows as it is (with :func:`~scpo_bench.errors.printable` applied), and does not act upon.
A terminal needs no more than ``printable``; the page's HTML is escaped by Jinja, everywhere.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence

from scpo_bench.errors import printable

# Markdown.

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKDOWN = _HTML | {c: f"\\{c}" for c in "\\`*_[]|#~!$"}
# GitHub makes links of bare addresses and mentions, escaped or not; nothing but a tag inside them
# stops it, and an empty comment is one that no reader sees.
_NO_LINK = "<!-- -->"
_LINKED = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)|(?<=mailto)(?=:)|(?<=xmpp)(?=:)", re.I)
_LIST_MARKER = re.compile(r"^(\d*)([-+.)])(?=\s|-|\+|$)")


def markdown(text: str) -> str:
    """``text`` for a heading, a list item or a table's cell of Markdown; line breaks are spaces."""
    text = printable(text.replace("\n", " ")).strip(" ")
    parts = ["".join(_MARKDOWN.get(c, c) for c in part) for part in _LINKED.split(text)]
    return _LIST_MARKER.sub(r"\1\\\2", _NO_LINK.join(parts))


# LaTeX.

_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}"},
    # After the end of a table's row, these would be an argument of \\.
    **{"[": "{[}", "]": "{]}", "*": "{*}"},
    **{
        "→": r"$\to$",
        "–": "--",
        "†": r"\textdagger{}",
        "‡": r"\textdaggerdbl{}",
        "“": "``",
        "”": "''",
    },
}


def _latex_character(character: str) -> str:
    if character in _LATEX or character.isascii():
        return _LATEX.get(character, character)
    # What pdfTeX does not know ends a document; which those are depends on fonts and packages.
    return f"{{[}}U+{ord(character):04X}{{]}}"


def latex(text: str) -> str:
    """``text`` for a table or caption of LaTeX, as ASCII; further lines are stacked.

    A hyphen before a number, not within a word, becomes a minus sign. Characters that LaTeX may
    not know read [U+03C3].
    """
    lines = ["".join(map(_latex_character, printable(line))) for line in text.split("\n")]
    lines = [re.sub(r"(?<![\w-])-(?=\d)", "$-$", line) for line in lines]
    return lines[0] if len(lines) == 1 else r"\shortstack{" + r" \\ ".join(lines) + "}"


def latex_comment(text: str) -> str:
    """A line of LaTeX that is not typeset, as ASCII."""
    shown = printable(text).encode("ascii", "backslashreplace").decode()
    return f"% {shown}"


# CSV.


def csv(text: str) -> str:
    """``text`` for a cell that a spreadsheet must not run: an apostrophe before any formula.

    Programs disagree on what begins one: also full-width characters, behind spaces or quotes.
    """
    text = printable(text)
    begin = unicodedata.normalize("NFKC", text).lstrip(" '\"‘’“”`\N{REPLACEMENT CHARACTER}")[:1]
    return f"'{text}" if begin in tuple("=+-@|%\N{MINUS SIGN}") else text


# Figures.


def figure_text(text: str) -> str:
    """``text`` for a title or a legend, where Matplotlib hides names that begin with "_"."""
    shown = printable(text)
    return f" {shown}" if shown.startswith("_") else shown


# Shell.


def shell_command(words: Sequence[str], options: Mapping[str, str]) -> str:
    """``scpo-bench`` with these words and options, for a reader to paste into a POSIX shell.

    No text becomes a second command or, where it begins with a hyphen, an option.
    """
    given = [text for name, value in options.items() for text in (f"--{name}", printable(value))]
    command, *arguments = map(printable, words)
    if any(argument.startswith("-") for argument in arguments):
        return shlex.join(["scpo-bench", command, *given, "--", *arguments])
    return shlex.join(["scpo-bench", command, *arguments, *given])
