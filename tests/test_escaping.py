"""Hostile names in every format: shown as they are, never acted upon."""

from __future__ import annotations

import csv as csv_files
import io
import re
import shlex
import unicodedata

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.testing import CliRunner

from scpo_bench.cli import app
from scpo_bench.errors import UserError, printable
from scpo_bench.leaderboard.columns import command_of
from scpo_bench.leaderboard.escaping import csv, figure_text, latex, latex_comment, markdown
from scpo_bench.leaderboard.figures import Figure, Series, panel
from scpo_bench.leaderboard.plots import STYLE, draw
from scpo_bench.leaderboard.render import markdown_table
from scpo_bench.leaderboard.styles import REFERENCE

PIECES = (
    *("[a](http://x.y)", "![i](//x)", "https://x.y/z", "www.x.y", "ftp://x", "me@x.org", "@user"),
    *("<b>", "<!--", "-->", "</td>", "&amp;", "&lt;", "|", "\\|", "\\", "`", "``", "*", "__", "~~"),
    *("#", "- ", "1. ", "1) ", "+ ", "> ", "---", "===", "\n", "\r\n", "\n\n", "\t", "$x$", "$$"),
    *("=", "+", "-", "@", "＝", "＋", "－", "＠", "−", "'", '"', " ", "\x00", "\x1b[31m", "\x85"),
    *("\u202e", "\u2066", "\u200b", "\ufeff", "\u3164", "\u2028", "\ufe0f", "%", "{", "}", "^"),
    *("\\input{x}", "\\\\", "[2em]", "(", ")", "é", "σ", "→", "†", "ﬁ", "_x", "--help", ";", "a"),
    *("mailto:a", "xmpp:a", "WWW.", "HTTPS://", "$(x)", "!x", "~", "\ud800"),
)
hostile = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=8).map("".join)


@given(hostile)
@example("a\u3164\ufe0f\u2800")
def test_printable_text_hides_nothing(text):
    """One line, no character that steers a terminal, reorders what follows it, or is not seen."""
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn"}
    assert not set(shown) & set("\u3164\u115f\u034f\ufe0f\u2800\U000e0100")
    assert len(shown) == len(text)
    assert printable(shown) == shown
    assert "\N{REPLACEMENT CHARACTER}" not in printable("an agent's name, Σ → é †")


def test_messages_are_printable():
    """A name from a file reaches the terminal in an error message, too."""
    assert str(UserError("unknown agent 'a\u202eb\x1b[2J\u200b'")) == "unknown agent 'a�b�[2J�'"


def test_a_list_of_suites_shows_their_descriptions(tmp_path, monkeypatch):
    """A suites file of somebody else styles no terminal, neither by codes nor by Rich's markup."""
    (tmp_path / "benchmarks.yaml").write_text(
        'version: 1\nsuites:\n  s:\n    description: "a\\e[31m[bold]b"\n'
        "    agents: [ppo]\n    steps: 10\n    seeds: 1\n    tasks: [SafetyPointGoal1-v0]\n"
    )
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["list", "suites"]).output
    assert "a�[31m[bold]b" in shown


# Markdown.

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
LINKED = re.compile(r"://\S|www\.|\w@\w|@\w|mailto:|xmpp:", re.I)


def inline_tokens(source: str) -> list[Token]:
    """The tokens of all texts in a Markdown source, and that there is nothing else in it."""
    found = []
    for token in PARSER.parse(source):
        assert token.type not in ("html_block", "fence", "code_block", "hr", "link")
        if token.type == "inline":
            assert token.children is not None
            found += token.children
    return found


def check_markdown(source: str, text: str, expected_lists: int) -> None:
    tokens = PARSER.parse(source)
    assert sum(t.type in ("bullet_list_open", "ordered_list_open") for t in tokens) == (
        expected_lists
    )
    children = inline_tokens(source)
    # Text alone, but for the comments that keep addresses from becoming links.
    assert {t.type for t in children} <= {"text", "html_inline", "text_special"}
    assert all(t.content == "<!-- -->" for t in children if t.type == "html_inline")
    # GitHub looks for addresses in each text between two tags.
    shown = [""]
    for token in children:
        if token.type == "html_inline":
            shown.append("")
        else:
            shown[-1] += token.content
    assert not any(map(LINKED.search, shown))
    assert "".join(shown).strip() == printable(text.replace("\n", " ")).strip()


@given(hostile)
@example("https://x.y me@x.org @user www.x.y")
def test_markdown_shows_the_text_alone(text):
    """No link, image, mention, HTML, code or emphasis comes of a name, in a heading or a list."""
    for before, lists in (("### ", 0), ("- ", 1), ("", 0)):
        check_markdown(f"{before}{markdown(text)}\n", text, lists)


@given(hostile)
def test_a_markdown_cell_is_one_cell(text):
    """A pipe or a line break in a name must not move the cells behind it."""
    lines = markdown_table(["a", "b"], [True, False], [[text, "7"]])
    tokens = PARSER.parse("\n".join(lines))
    cells = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "td_open"]
    assert len(lines) == 3
    assert len(cells) == 2
    assert cells[1].content == "7"
    texts = [t.content for t in cells[0].children or () if t.type != "html_inline"]
    assert "".join(texts).strip() == printable(text.replace("\n", " ")).strip()


def test_ordinary_names_and_numbers_stay_as_they_are():
    """The tables in README.md must stay readable as text."""
    for text in ("scpo-ppo", "-3.25 → -1", "1.5", "3/5", "–", "safe throughout †", "50%", "a: b"):
        assert markdown(text) == text
    assert markdown("$x$ [1]") == r"\$x\$ \[1\]"  # GitHub would typeset the first


# LaTeX.

COMMAND = re.compile(
    r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar"
    r"|textasciigrave|textdaggerdbl|textdagger)\{\}|\\[&%$#_{}]|\$\\to\$|\$-\$|\{[\[\]*]\}"
)


@given(hostile)
def test_latex_holds_no_command_of_the_text(text):
    """Only the commands of our own table are in it, and only characters that every TeX knows."""
    line = text.replace("\n", " ")
    escaped = latex(line)
    assert escaped.isascii()
    assert not set(COMMAND.sub("", escaped)) & set("\\{}$%#&_^~[]*|`<>\n\r") - (
        {"`"} if "“" in line else set()
    )
    assert len(latex_comment(text).splitlines()) == 1
    assert latex_comment(text).isascii()


def test_latex_by_hand():
    """One of each."""
    assert latex(r"\input{a_b}") == r"\textbackslash{}input\{a\_b\}"
    assert latex("σ é → −") == r"{[}U+03C3{]} {[}U+00E9{]} $\to$ {[}U+2212{]}"
    assert latex("*[1]") == "{*}{[}1{]}"
    assert latex("-1 a-1") == "$-$1 a-1"
    assert latex("a\nb") == r"\shortstack{a \\ b}"


# CSV.


@given(hostile)
@example(" ＝1+1")
@example("−1")
@example("'\"\u200b=cmd()")
def test_no_csv_cell_is_a_formula(text):
    """Spreadsheets run what begins like one, full-width or behind spaces, quotes, invisibles."""
    cell = csv(text)
    first = cell.lstrip(' "‘’“”`\ufffd\t\r\n')[:1]
    assert unicodedata.normalize("NFKC", first) not in ("=", "+", "-", "@", "\u2212")
    assert cell in (printable(text), f"'{printable(text)}")
    file = io.StringIO()
    csv_files.writer(file).writerow([cell, "7"])
    assert next(csv_files.reader(io.StringIO(file.getvalue()))) == [cell, "7"]


def test_ordinary_text_is_no_formula():
    """Names are found again as they were written."""
    assert csv("scpo-ppo #1a2b") == "scpo-ppo #1a2b"
    assert csv("scpo-bench run s --seeds 5") == "scpo-bench run s --seeds 5"


# Shell.


def parsed(command: str) -> dict[str, object]:
    """What our own command line understands of it."""
    program, name, *arguments = shlex.split(command)
    assert program == "scpo-bench"
    group = typer.main.get_command(app)
    return group.commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]


@given(hostile.filter(bool), hostile.filter(bool))
@example("--help", "-j")
@example("--", "--agents")
def test_a_pasted_command_says_what_was_recorded(agent, task):
    """An agent called --help, or one with a shell's characters in its name, is only a name."""
    run = parsed(command_of(agent, agent, task, 3, 70))
    assert run["suite"] == printable(agent)
    assert (run["agents"], run["tasks"]) == ([printable(agent)], [printable(task)])
    compare = parsed(command_of("compare-t", agent, task, 3, 70))
    assert (compare["agents"], compare["task"]) == ([printable(agent)], printable(task))
    assert (compare["seeds"], compare["steps"]) == (3, 70)


# Figures.


@pytest.mark.parametrize("name", ["$\\frac{a}$", "_hidden", "\\input{x}", "a$b", "{}^_", "\x1b[1m"])
def test_figures_show_names_as_they_are(name):
    """A dollar sign starts no formula, and an underscore hides no agent from the legend."""
    import matplotlib

    series = Series(name, REFERENCE, [0.0, 1.0], [0.0, 1.0])
    with matplotlib.rc_context({"text.usetex": True, **STYLE}):
        canvas = draw(Figure("s", "t", "n", name, [panel(name, "y", [series])], 1))
        canvas.savefig(io.BytesIO(), format="svg")
        shown = [text.get_text() for text in canvas.legends[0].get_texts()]
        assert canvas.get_suptitle() == shown[0] == figure_text(name)
    assert shown[0].strip() == printable(name)
