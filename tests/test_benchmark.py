"""benchmarks.yaml: every mistake is one line that names the field; cells have content keys."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import yaml

from scpo_bench.errors import UserError
from scpo_bench.suites.cells import cells, comparison, get_suite, run_folder
from scpo_bench.suites.schema import load_benchmarks

ROOT = Path(__file__).parent.parent
VALID = {
    "version": 1,
    "suites": {
        "core": {
            "description": "d",
            "seeds": 2,
            "tasks": [
                {"id": "scpo_bench/HarmfulRegression-v0", "agents": ["scpo", "ppo"], "steps": 100}
            ],
            "config": {"ppo": {"n_steps": 10}},
        }
    },
}


def load(tmp_path, data):
    path = tmp_path / "benchmarks.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_benchmarks(path)


def changed(*path_and_value):
    """VALID with one value replaced, addressed by keys and indices."""
    data = yaml.safe_load(yaml.safe_dump(VALID))
    *path, last, value = path_and_value
    place = data
    for part in path:
        place = place[part]
    place[last] = value
    return data


def laughs(line, alias):
    """A billion laughs: each line stands for ten of the one before it."""
    inner = [", ".join([alias.format(i - 1)] * 10) if i else "1" for i in range(10)]
    lines = [line.format(i, i, text) for i, text in enumerate(inner)]
    return "\n".join(lines) if "<<" not in line else "\n".join(["a0: &a0 {x: 1}", *lines[1:]])


TASK = ("suites", "core", "tasks", 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            changed(*TASK, "agents", ["scpo", "cpoo"]),
            r"suites\.core\.tasks\[0\]\.agents\[1\]: unknown agent 'cpoo'; did you mean 'cpo'\?",
        ),
        (
            changed(*TASK, "id", "scpo_bench/HarmfulRegresion-v0"),
            "unknown task .* did you mean 'scpo_bench/HarmfulRegression-v0'",
        ),
        (changed(*TASK, "id", "SafetyPointGaol1-v0"), "did you mean 'SafetyPointGoal1-v0'"),
        (changed(*TASK, "stepss", 3), r"tasks\[0\]\.stepss: unknown key; did you mean 'steps'\?"),
        (
            changed("suites", "core", "seed", 3),
            r"suites\.core\.seed: unknown key; did you mean 'seeds'\?",
        ),
        (
            changed(*TASK, "steps", "many"),
            r"tasks\[0\]\.steps: input should be a valid integer.*got 'many'",
        ),
        (
            changed(*TASK, "steps", 0),
            r"tasks\[0\]\.steps: input should be greater than or equal to 1, got '0'",
        ),
        (
            changed(*TASK, "start", "bakcup"),
            r"tasks\[0\]\.start: input should be 'backup', 'zero' or 'random'",
        ),
        (
            changed("suites", "core", "config", {"cpo": {}}),
            r"config: 'cpo' runs in no task of the suite",
        ),
        (
            changed(*TASK, "config", {"sgd": {}}),
            r"tasks\[0\]\.config: 'sgd' is not among its agents",
        ),
        (changed(*TASK, "id", "CartPole-v1"), r"tasks\[0\]\.cost_limit: needed, since CartPole-v1"),
        (changed("version", 2), "version: input should be 1"),
        ("suites: [", "not valid YAML"),
        ("version: 1\nsuites: {a: {x: 1}, a: {x: 2}}", "line 2: 'a' stands twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("just text", "file: input should be a valid dictionary"),
        ("\x00", "not valid YAML"),
        (
            changed(*TASK, "cost_limit", float("nan")),
            r"tasks\[0\]\.cost_limit: input should be (a finite number|greater)",
        ),
        (changed(*TASK, "env", {"noise": float("inf")}), r"tasks\[0\]\.env"),
        (
            yaml.safe_dump(VALID).replace("n_steps: 10", "n_steps: 0x" + "f" * 5000),
            r"suites\.core\.config: Exceeds the limit",
        ),
        ("version: 1\nsuites: {a: 2025-12-13}", r"suites\.a: "),
        ("? [a]\n: b", "line 1: a key must be a single value"),
        ("a: &a [*a]", "line 1: an alias inside of what it stands for"),
        ("version: !!bool maybe", "not valid YAML"),
        ("version: !!timestamp maybe", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
        ("- " * 100_000, "not valid YAML"),
        (laughs("a{} : &a{} [{}]", "*a{}"), "more than 100000 values"),
        (laughs("a{}: &a{} {{<<: [{}]}}", "*a{}"), "more than 100000 values"),
        ('version: "\\e[2J\\n"', r"version: input should be 1, got '\\x1b"),
    ],
)
def test_mistakes_are_one_line(tmp_path, data, message):
    """File, field, expectation, what came, nearest choice - and never a traceback of another kind.
    """
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    assert str(caught.value).startswith("benchmarks.yaml: ")


def test_cells_merge_configuration_and_take_the_tasks_cost_limit(tmp_path):
    """Suite-wide settings, then the task's; limit 0 is the custom task's own; seeds count from 0.
    """
    data = changed(*TASK, "config", {"ppo": {"n_steps": 20, "gamma": 0.5}})
    found = cells(get_suite(load(tmp_path, data), "core"))
    assert [(c.agent, c.seed) for c in found] == [("scpo", 0), ("scpo", 1), ("ppo", 0), ("ppo", 1)]
    assert found[2].config == {"n_steps": 20, "gamma": 0.5}
    assert found[0].cost_limit == 0.0


def test_key_depends_on_content_alone(tmp_path):
    """Equal cells, equal keys; any other seed, budget or setting, another key."""
    suite = get_suite(load(tmp_path, VALID), "core")
    one, two = cells(suite)[0], cells(suite)[0]
    assert one.key() == two.key()
    for change in ({"seed": 9}, {"steps": 101}, {"config": {"L": 1.0}}, {"start": "backup"}):
        assert one.model_copy(update=change).key() != one.key()


def test_restriction_and_third_party_agents(tmp_path):
    """--agents picks from the suite and adds module:Class; unknown tasks and agents are named."""
    suite = get_suite(load(tmp_path, VALID), "core")
    assert {c.agent for c in cells(suite, ["ppo", "mine:Agent"])} == {"ppo", "mine:Agent"}
    assert len(cells(suite, seeds=5)) == 10
    with pytest.raises(UserError, match="--agents: unknown agent 'ppoo'; did you mean 'ppo'"):
        cells(suite, ["ppoo"])
    with pytest.raises(UserError, match="--tasks: the suite has no task"):
        cells(suite, tasks=["scpo_bench/HarmfulRegresion-v0"])
    with pytest.raises(UserError, match="unknown suite 'coer'; did you mean 'core'"):
        get_suite(load(tmp_path, VALID), "coer")


def test_comparison_uses_the_suites_settings(tmp_path):
    """`compare` runs a task the way the suites do, unless told otherwise."""
    name, suite = comparison(
        load(tmp_path, VALID), ["ppo"], "scpo_bench/HarmfulRegression-v0", 1, 50, None
    )
    (cell,) = cells(suite)
    assert name == "compare-scpo_bench.HarmfulRegression-v0"
    assert (cell.steps, cell.config) == (50, {"n_steps": 10})


def test_run_folders_stay_inside_the_results(tmp_path):
    """Names with slashes or dots cannot lead out of the folder."""
    cell = cells(get_suite(load(tmp_path, VALID), "core"))[0].model_copy(
        update={"agent": "../../x:Y", "task": "../t"}
    )
    assert run_folder(tmp_path, "core", cell).resolve().is_relative_to(tmp_path / "core")


def test_committed_file_is_valid_and_packaged():
    """The repository's suites load, and the package carries the same file."""
    assert {"quick", "paper"} <= set(load_benchmarks(ROOT / "benchmarks.yaml").suites)
    assert (ROOT / "scpo_bench" / "suites" / "benchmarks.yaml").read_bytes() == (
        ROOT / "benchmarks.yaml"
    ).read_bytes()


def test_files_without_an_end_and_not_in_utf8(tmp_path):
    """Reading stops at the bound, whatever the file system says of the size."""
    with pytest.raises(UserError, match=r"zero: larger than 1000000 bytes"):
        load_benchmarks(Path("/dev/zero"))
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(1_000_000_000)
    with pytest.raises(UserError, match=r"large\.yaml: larger than"):
        load_benchmarks(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes("version: 1 # ä".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: not valid YAML \('utf-8' codec"):
        load_benchmarks(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_benchmarks(tmp_path)


def test_a_billion_runs_are_refused(tmp_path):
    """A slip in a number must not fill the memory before anything is said."""
    for data, seeds in ((changed("suites", "core", "seeds", 10**9), None), (VALID, 10**9)):
        with pytest.raises(UserError, match="more than 100000 runs"):
            cells(get_suite(load(tmp_path, data), "core"), seeds=seeds)


FUZZ_FILES = int(os.environ.get("SCPO_BENCH_FUZZ", "200"))
"""Mutated files that are loaded; the full check takes 10000."""
TOKENS = (
    "nan",
    ".nan",
    ".inf",
    "-.inf",
    "-1",
    "0",
    "1e999",
    "9" * 5000,
    "0x" + "f" * 5000,
    "1:" * 50 + "1",
    "null",
    "~",
    "true",
    "''",
    "[]",
    "{}",
    "[[]]",
    "{a: {}}",
    "*constrained",
    "&x [*x]",
    "<<: *imitation",
    "!!python/object:os.system {}",
    "!!binary aGk=",
    "!!set {a}",
    "2025-12-13",
    "!!timestamp x",
    "!!int x",
    "!!float x",
    "!!bool x",
    "? [a] : b",
    "- ",
    "  ",
    "\t",
    ": ",
    "#",
    "|\n x",
    "'",
    '"',
    "\x07",
    "\ud7ff",
    "\u2028",
    '"\\ud800"',
    "[" * 500,
    "{a: " * 500,
    "a" * 5000,
    "%YAML 9.9",
    "---",
    "...",
    "ppo",
    "SafetyPointGoal1-v0",
)


def mutate(text, rng):
    """One to three edits of lines, pieces, values and bytes."""
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(6)
        lines = text.splitlines(keepends=True) or [""]
        i = rng.randrange(len(lines))
        if kind == 0:
            del lines[i]
        elif kind == 1:
            lines.insert(rng.randrange(len(lines)), lines[i])
        elif kind == 2:
            lines[i] = " " * rng.randrange(8) + lines[i].lstrip()
        elif kind == 3:
            key, colon, _ = lines[i].partition(": ")
            lines[i] = f"{key}{colon}{rng.choice(TOKENS)}\n"
        else:
            at, length = rng.randrange(len(text) + 1), rng.randint(0, 12)
            new = (
                rng.choice(TOKENS)
                if kind == 4
                else "".join(chr(rng.randrange(256)) for _ in range(length))
            )
            lines = [text[:at], new, text[at + length :]]
        text = "".join(lines)
    return text


def test_mutated_files_never_end_in_a_traceback(tmp_path):
    """Whatever stands in the file, the outcome is cells with keys or one line that names the
    problem, and soon.
    """
    rng = random.Random(5)
    path = tmp_path / "benchmarks.yaml"
    committed = (ROOT / "benchmarks.yaml").read_text()
    small = yaml.safe_dump(VALID)
    loaded, refusals = 0, set()
    for i in range(FUZZ_FILES):
        # The committed file is a hundred times slower to read: it is there for its anchors and
        # merge keys.
        text = mutate(committed if i % 20 == 0 else small, rng)
        path.write_bytes(text.encode("utf-8" if rng.random() < 0.95 else "utf-16", "surrogatepass"))
        began = time.process_time()
        try:
            for suite in load_benchmarks(path).suites.values():
                for cell in cells(suite):
                    assert len(cell.key()) == 64
            loaded += 1
        except UserError as error:
            refusals.add(str(error))
        assert time.process_time() - began < 20
    assert 0 < loaded < FUZZ_FILES
    assert len(refusals) > FUZZ_FILES / 10
    assert all(refusal.isprintable() and len(refusal) < 700 for refusal in refusals)
