"""The page in a real browser: it draws, sorts, filters, opens rows by keyboard, fits a phone, and
runs nothing from a record.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import (
    GOAL,
    IMITATION,
    REFERENCES,
    REGRESSION,
    synthetic_cell,
    synthetic_updates,
    write_record,
    write_suite,
)

from scpo_bench.leaderboard.page import MAX_POINTS, embedded_json, render_page

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; Debian: apt-get install chromium"
)

HOSTILE = (
    "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>&amp;\u2028'\"`${1}"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """Two tasks and three agents; one agent's name and one failure's message try to run."""
    results = tmp_path_factory.mktemp("results")
    cells = write_suite(
        results, "s", (IMITATION, GOAL), ("scpo", "sgd", "ppo"), seeds=3, updates=12
    )
    hostile = synthetic_cell(HOSTILE.replace("\u2028", ""), IMITATION, 0, 12)
    write_record(
        results, "s", hostile, synthetic_updates(hostile, 12)[:5], status="failed", error=HOSTILE
    )
    return render_page(
        results, "s", [*cells, synthetic_cell("sgd", IMITATION, 3, 12)], references=REFERENCES
    )


class Outline(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.raw:
            self.raw[self._inside].append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def test_the_page_needs_nothing_else(page):
    """No address, no import, no attribute that loads or runs: it must work from a mail attachment,
    offline.
    """
    found = outline(page)
    assert [tag for tag, _ in found.tags].count("script") == 2
    for tag, attributes in found.tags:
        assert not {"src", "href", "srcset", "action", "style"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    script, style = found.raw["script"][1], found.raw["style"][0]
    for text in (script.replace("http://www.w3.org/2000/svg", ""), style):
        assert not re.search(r"https?:|@import|url\((?!#)|innerHTML|eval\(|document\.write", text)


def test_the_policy_allows_exactly_this_script_and_style(page):
    """A hash that does not fit would leave an empty page; a missing one would let anything run."""
    found = outline(page)
    policy = next(
        a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for kind, text in (("script", found.raw["script"][1]), ("style", found.raw["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_records_cannot_leave_their_data_block(page):
    """The hostile name and message appear as data only."""
    assert page.count("</script>") == 2
    data = json.loads(outline(page).raw["script"][0])
    assert any("window.ran" in row["agent"] for row in data["rows"])
    assert "<img" not in page


def test_embedded_json_round_trips():
    """Escapes must not change the value."""
    value = {"a": [HOSTILE, "</SCRIPT>", "<!--", 1.5, None]}
    text = embedded_json(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text)
    with pytest.raises(ValueError, match="JSON compliant"):
        embedded_json(float("nan"))


def test_the_same_records_make_the_same_page(tmp_path):
    """The committed page is regenerated and compared."""
    cells = write_suite(tmp_path, "s", (IMITATION,), ("scpo",), seeds=2, updates=4)
    assert render_page(tmp_path, "s", cells, references=REFERENCES) == render_page(
        tmp_path, "s", cells, references=REFERENCES
    )


def test_an_empty_page(tmp_path):
    """No records: a page with no rows."""
    assert '"rows":[]' in render_page(tmp_path, "s")


def test_thinning_keeps_every_violation(tmp_path):
    """Of thousands of updates only some points are drawn; one violating update among them must
    still show.
    """
    cell = synthetic_cell("scpo", IMITATION, 0, 3000)
    updates = synthetic_updates(cell, 3000)
    updates[1234] = updates[1234].model_copy(
        update={"iterate_violates": True, "iterate_worst_constraint_value": 0.1}
    )
    write_record(tmp_path, "s", cell, updates, ended="2025-12-13T23:00:00+00:00")
    data = json.loads(outline(render_page(tmp_path, "s", references=REFERENCES)).raw["script"][0])
    line = data["figures"][0]["panels"][2]["lines"][0]
    assert len(line["x"]) <= MAX_POINTS
    assert max(line["y"]) == 100


# In the browser, spoken to over its own pipe (Chrome DevTools protocol), so that no driver has to
# be installed.


class Browser:
    """One headless page. Raises AssertionError for what the protocol reports as an error."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        read_in, self._write = os.pipe()
        self._read, write_out = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--mute-audio",
        ]
        # The protocol's pipe is file descriptors 3 and 4 of the browser.
        shell = f'exec 3<&{read_in} 4>&{write_out}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                shell,
                CHROMIUM,
                *flags,
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(read_in, write_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_in)
        os.close(write_out)
        self._buffer, self._id, self._session = b"", 0, None
        self.complaints: list[str] = []
        deadline = time.monotonic() + 60
        target = None
        while target is None and time.monotonic() < deadline:
            targets = self.send("Target.getTargets")["targetInfos"]
            target = next((t["targetId"] for t in targets if t["type"] == "page"), None)
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser closed its pipe"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(message["params"]["exceptionDetails"])[:500])
        if (
            message.get("method") == "Log.entryAdded"
            and message["params"]["entry"]["level"] == "error"
        ):
            self.complaints.append(message["params"]["entry"]["text"])
        return message

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 30
        while (
            self.value("document.readyState") != "complete"
            or self.value("location.protocol") != "file:"
        ):
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        codes = {
            "Tab": 9,
            "Enter": 13,
            " ": 32,
            "ArrowRight": 39,
            "End": 35,
            "Escape": 27,
            "ArrowDown": 40,
        }
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                **more,
            )

    def resize(self, width: int, height: int, phone: bool) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def shown(browser, page, tmp_path) -> Browser:
    """The page freshly loaded at desktop size."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.complaints.clear()
    browser.resize(1400, 900, phone=False)
    browser.open(path)
    return browser


ROWS = "[...document.querySelectorAll('#table > tbody > tr:not(.detail)')]"


@needs_browser
def test_it_draws_table_and_figures(shown):
    """Rows, charts for both tasks, certificate, Pareto front, aggregates and notes are there, and
    nothing was logged as an error.
    """
    assert shown.value(f"{ROWS}.length") == 7
    titles = shown.value("[...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    assert sum("violates, %" in t for t in titles) == 2
    assert sum("Pareto" in t for t in titles) == 2
    assert sum("Constraint" in t for t in titles) == 2
    assert shown.value(
        "[...document.querySelectorAll('#figures svg path')].every(p => !p.getAttribute('d').includes('NaN'))"
    )
    assert shown.value("document.querySelectorAll('#figures svg path').length") > 20
    assert "at the floor" in shown.value("document.getElementById('notes').textContent")
    assert "preliminary" in shown.value(f"{ROWS}[0].textContent")
    assert "2 of 4 seeds" not in shown.value("document.body.textContent")
    assert "1 of 4 seeds not finished" in shown.value("document.body.textContent")
    assert shown.complaints == []


@needs_browser
def test_performance_profile(browser, tmp_path):
    """Several normalised tasks: a chart with a line and a band per agent, which says its values and
    follows the filter.
    """
    write_suite(tmp_path, "s", (IMITATION, REGRESSION), ("scpo", "sgd"), seeds=3, updates=4)
    path = tmp_path / "page.html"
    path.write_text(render_page(tmp_path, "s", references=REFERENCES), encoding="utf-8")
    browser.complaints.clear()
    browser.resize(1400, 900, phone=False)
    browser.open(path)
    assert "Performance profile" in browser.value(
        "document.querySelector('#all-tasks figcaption').textContent"
    )
    assert browser.value("document.querySelectorAll('#all-tasks figure path').length") == 4
    focus(browser, "#all-tasks figure svg")
    browser.press("ArrowRight")
    assert browser.value("document.querySelector('#all-tasks .readout').textContent").endswith(
        " %: sgd 100; scpo 100"
    )
    browser.value("document.querySelector('#agents input').click()")
    assert browser.value("document.querySelectorAll('#all-tasks figure path').length") == 2
    assert browser.complaints == []


@needs_browser
def test_nothing_from_a_record_runs(shown):
    """The hostile name is on the page, as text."""
    assert "onerror=window.ran" in shown.value("document.body.textContent")
    assert shown.value("typeof window.ran") == "undefined"
    assert shown.value("document.querySelectorAll('img').length") == 0


def focus(browser: Browser, selector: str) -> None:
    """Press Tab until the element has the focus: what the keyboard cannot reach fails here."""
    for _ in range(60):
        browser.press("Tab")
        if browser.value(f"document.activeElement.matches({json.dumps(selector)})"):
            return
    pytest.fail(f"Tab never reaches {selector}")


@needs_browser
def test_sorting_by_keyboard(shown):
    """Tab to a heading, Enter sorts up, Enter again down; never and unknown come last as they
    should; the focus stays.
    """
    focus(shown, "th:nth-child(10) button")
    cells = f"{ROWS}.map(r => r.children[9].textContent)"
    shown.press("Enter", "\r")
    up = shown.value(cells)
    assert (
        shown.value("document.querySelector('th:nth-child(10)').getAttribute('aria-sort')")
        == "ascending"
    )
    numbers = [float(v) for v in up if v != "never"]
    assert numbers == sorted(numbers)
    assert up[-1] == "never"
    shown.press("Enter", "\r")
    assert (
        shown.value("document.querySelector('th:nth-child(10)').getAttribute('aria-sort')")
        == "descending"
    )
    down = shown.value(cells)
    assert down[0] == "never"
    assert sorted(down) == sorted(up)


@needs_browser
def test_filters_by_keyboard(shown):
    """A task is chosen and an agent switched off without a mouse; table and figures follow."""
    focus(shown, "#task")
    shown.press("ArrowDown")
    assert shown.value("document.getElementById('task').value") != ""
    assert shown.value(f"new Set({ROWS}.map(r => r.children[0].textContent)).size") == 1
    assert shown.value("document.querySelectorAll('#figures h2').length") == 1
    before = shown.value(f"{ROWS}.length")
    focus(shown, "#agents input")
    shown.press(" ", " ")
    assert shown.value(f"{ROWS}.length") == before - 1
    assert "scpo" not in shown.value(f"{ROWS}.map(r => r.children[2].textContent)")
    assert shown.value("document.getElementById('shown').textContent") == f"{before - 1} of 7 rows"
    assert shown.complaints == []


@needs_browser
def test_details_by_keyboard(shown):
    """A row opens to its command, every column, every run and its provenance."""
    focus(shown, "td button")
    shown.press("Enter", "\r")
    assert shown.value("document.activeElement.getAttribute('aria-expanded')") == "true"
    text = shown.value("document.querySelector('tr.detail:not([hidden])').textContent")
    assert "scpo-bench run s --agents scpo --tasks SafetyPointGoal1-v0 --seeds 3" in text
    for part in ("cvar95 cost low", "versions torch", "2.13.0", "Seeds 0, 1, 2", "finished"):
        assert part in text, part
    shown.press("Enter", "\r")
    assert shown.value("document.querySelectorAll('tr.detail:not([hidden])').length") == 0


@needs_browser
def test_charts_read_out_their_values_by_keyboard(shown):
    """Arrow keys move a cursor along the updates and say the values there; Escape ends it."""
    focus(shown, "figure svg")
    shown.press("ArrowRight")
    readout = "document.activeElement.closest('figure').querySelector('.readout').textContent"
    assert shown.value(readout).startswith("Update 0: ")
    shown.press("End")
    last = shown.value(readout)
    assert last.startswith("Update 12: ")
    assert "scpo" in last
    shown.press("Escape")
    assert shown.value(readout) == ""


@needs_browser
def test_it_fits_a_phone(shown):
    """At 360 x 740 nothing makes the page scroll sideways, rows become cards with labels, and text
    is not tiny; open rows too.
    """
    shown.resize(360, 740, phone=True)
    time.sleep(0.2)
    shown.value("document.querySelector('td button').click()")
    assert shown.value("getComputedStyle(document.querySelector('#table thead')).display") == "none"
    label = "getComputedStyle(document.querySelector('#table > tbody > tr > td:nth-child(3)'), '::before').content"
    assert shown.value(label) == '"Agent"'
    assert (
        shown.value("parseFloat(getComputedStyle(document.querySelector('#table td')).fontSize)")
        >= 12
    )
    wide = (
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 361 "
        "&& !e.closest('.scroll .scroll'))"
    )
    assert shown.value(f"{wide}.map(e => e.tagName + '.' + e.className)") == []
    assert shown.value("document.documentElement.scrollWidth") <= 360
    assert shown.value("document.getElementById('sort').offsetParent !== null")
    shown.value(
        "(() => { const s = document.getElementById('sort'); s.value = '9'; s.dispatchEvent(new Event('change')); })()"
    )
    assert shown.value(f"{ROWS}.at(-1).children[9].textContent") == "never"
    assert shown.complaints == []
