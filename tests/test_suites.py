"""Suites files: settings, defaults and extended suites give cells; mistakes give one line each."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
import yaml

from scpo_bench.errors import UserError
from scpo_bench.records.files import read_run, run_folders
from scpo_bench.suites.cells import cells, comparison, get_suite, run_folder
from scpo_bench.suites.schema import PACKAGED_FILE, Suite, load_benchmarks

ROOT = Path(__file__).parent.parent
REGRESSION = "scpo_bench/HarmfulRegression-v0"
VALID = {
    "version": 1,
    "suites": {
        "core": {
            "description": "d",
            "seeds": 2,
            "tasks": [{"id": REGRESSION, "agents": ["scpo", "ppo"], "steps": 100}],
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


def with_defaults(**defaults):
    """VALID with these file-wide defaults."""
    return {**VALID, "defaults": defaults}


def with_suite(suite, name="more"):
    """VALID with one more suite after the first."""
    return {**VALID, "suites": {**VALID["suites"], name: suite}}


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
        (changed(*TASK, "stepss", 3), r"tasks\[0\]: unknown key 'stepss'; did you mean 'steps'\?"),
        (
            changed("suites", "core", "seed", 3),
            r"suites\.core: unknown key 'seed'; did you mean 'seeds'\?",
        ),
        (
            changed(*TASK, "steps", "many"),
            r"tasks\[0\]\.steps: Input should be a valid integer.*got 'many'",
        ),
        (
            changed(*TASK, "steps", 0),
            r"tasks\[0\]\.steps: Input should be greater than or equal to 1, got 0",
        ),
        (
            changed(*TASK, "start", "bakcup"),
            r"tasks\[0\]\.start: Input should be 'backup', 'zero' or 'random'",
        ),
        (
            changed("suites", "core", "config", {"cpo": {}}),
            r"suites\.core\.config: 'cpo' is not among the agents; did you mean 'scpo'",
        ),
        (
            changed(*TASK, "config", {"sgd": {}}),
            r"tasks\[0\]\.config: 'sgd' is not among the agents; known: ppo, scpo",
        ),
        (changed(*TASK, "id", "CartPole-v1"), r"tasks\[0\]\.cost_limit: needed, since CartPole-v1"),
        (changed("version", 2), "version: Input should be 1"),
        ("suites: [", "not valid YAML"),
        ("version: 1\nsuites: {a: {x: 1}, a: {x: 2}}", "line 2: 'a' appears twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("just text", "file: Input should be a valid dictionary"),
        ("\x00", "not valid YAML"),
        (
            changed(*TASK, "cost_limit", float("nan")),
            r"tasks\[0\]\.cost_limit: Input should be (a finite number|greater)",
        ),
        (changed(*TASK, "env", {"noise": float("inf")}), r"tasks\[0\]\.env"),
        (
            yaml.safe_dump(VALID).replace("seeds: 2", "seeds: 0x" + "f" * 5000),
            r"suites\.core\.seeds: .*got int of many digits",
        ),
        (
            yaml.safe_dump(VALID).replace("n_steps: 10", "n_steps: 0x" + "f" * 5000),
            r"suites\.core\.config: Exceeds the limit",
        ),
        ("version: 1\nsuites: {a: 2025-12-13}", r"suites\.a: "),
        (with_defaults(stepss=3), r"defaults: unknown key 'stepss'; did you mean 'steps'"),
        (with_defaults(id="x"), r"defaults: unknown key 'id'"),
        (with_defaults(steps="x"), r"defaults\.steps: Input should be a valid integer"),
        (with_defaults(agents=["ppo", "pppo"]), r"defaults\.agents\[1\]: unknown agent 'pppo'"),
        (
            with_defaults(config={"pppo": {}}),
            r"defaults\.config.*: unknown agent 'pppo'; did you mean 'ppo'",
        ),
        (
            with_defaults(config={"ppo": {"x": float("nan")}}),
            r"defaults\.config\.ppo\.x.*finite number, got nan",
        ),
        (
            changed("suites", "core", "extends", "cor"),
            r"suites\.core\.extends: no suite 'cor' above this one",
        ),
        (
            changed("suites", "core", "extends", "core"),
            r"suites\.core\.extends: no suite 'core' above this one",
        ),
        (
            with_suite({"extends": "coer"}),
            r"suites\.more\.extends: no suite 'coer' above this one; did you mean 'core'\?",
        ),
        (
            with_suite({"extends": "core", "seed": 3}),
            r"suites\.more: unknown key 'seed'; did you mean 'seeds'",
        ),
        (
            with_suite({"extends": "core", "agents": ["ppo"], "config": {"ppo": {}, "cpo": {}}}),
            r"suites\.more\.config: 'cpo' is not among the agents; did you mean 'scpo'",
        ),
        (
            with_suite({"extends": "core", "tasks": ["SafetyPointGaol1-v0"], "agents": ["ppo"]}),
            r"suites\.more\.tasks\[0\]\.steps: needed for the task, its suite or in `defaults`",
        ),
        (with_suite({"description": "d"}), r"suites\.more\.tasks: needed, since the suite extends"),
        (with_suite({"tasks": ["x"]}), r"suites\.more\.description: needed, since the suite ext"),
        (
            changed("suites", "core", "tasks", [{"id": "SafetyPointGoal1-v0", "extends": "x"}]),
            r"suites\.core\.tasks\[0\]\.extends: no task 'x' above this one",
        ),
        (
            with_suite({"extends": "core", "tasks": ["SafetyAntVelocity-v1"] * 2}),
            r"suites\.more\.tasks\[1\]\.id: 'SafetyAntVelocity-v1' appears twice in the suite",
        ),
        (
            with_suite(
                {"extends": "core", "tasks": ["SafetyAntVelocty-v1"], "steps": 1, "agents": ["ppo"]}
            ),
            r"suites\.more\.tasks\[0\]\.id: unknown task.*did you mean 'SafetyAntVelocity-v1'",
        ),
        (
            changed(
                "suites", "core", {"description": "d", "tasks": [{"id": REGRESSION, "steps": 1}]}
            ),
            "agents: needed",
        ),
        ("? [a]\n: b", "line 1: a key must be a single value"),
        ("a: &a [*a]", "line 1: an alias inside the value it names"),
        ("version: !!bool maybe", "not valid YAML"),
        ("version: !!timestamp maybe", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
        ("- " * 100_000, "not valid YAML"),
        (laughs("a{} : &a{} [{}]", "*a{}"), "more than 100000 values"),
        (laughs("a{}: &a{} {{<<: [{}]}}", "*a{}"), "more than 100000 values"),
        ('version: "\\e[2J\\n"', r"version: Input should be 1, got '\\x1b"),
    ],
)
def test_mistakes_are_one_line(tmp_path, data, message):
    """The message names the file, the field, what was expected, what was given, what is near."""
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    assert str(caught.value).startswith("benchmarks.yaml: ")


def test_cells_merge_configuration_and_take_the_tasks_cost_limit(tmp_path):
    """Suite-wide settings, then the task's; the limit is the task's own; seeds count from 0."""
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


LAYERS = """
version: 1
defaults:
  agents: [ppo, cpo]
  seeds: 2
  steps: 100
  num_envs: 8
  config: {ppo: {gamma: 0.5, n_steps: 10}}
suites:
  base:
    description: b
    start: backup
    num_envs: 4
    config: {ppo: {n_steps: 20}}
    tasks:
      - SafetyPointGoal1-v0
      - {id: SafetyPointGoal2-v0, steps: 300, config: {ppo: {batch_size: 5}}}
      - {id: SafetyCarGoal1-v0, extends: SafetyPointGoal2-v0, config: {ppo: {batch_size: 7}}}
  longer:
    extends: base
    steps: 1000
    config: {cpo: {gamma: 0.9}}
  fewer:
    extends: longer
    seeds: 1
    tasks:
      - {id: SafetyPointGoal2-v0, num_envs: 1}
      - SafetyAntVelocity-v1
"""


def test_the_setting_nearest_to_the_task_applies(tmp_path):
    """Precedence: task, suite, `defaults`; the fields of an agent's configuration are merged."""
    suites = load(tmp_path, LAYERS).suites
    goal1, goal2, car = suites["base"].tasks
    assert (goal1.agents, goal1.seeds, goal1.steps) == (["ppo", "cpo"], 2, 100)
    assert (goal1.num_envs, goal1.start) == (4, "backup")
    assert goal1.config == {"ppo": {"gamma": 0.5, "n_steps": 20}}
    assert goal2.steps == 300
    assert goal2.config == {"ppo": {"gamma": 0.5, "n_steps": 20, "batch_size": 5}}
    assert car.steps == 300  # of the task that it extends
    assert car.config == {"ppo": {"gamma": 0.5, "n_steps": 20, "batch_size": 7}}


def test_extending_a_suite_takes_everything_but_what_is_overridden(tmp_path):
    """A suite's settings override the other's suite settings; the tasks' own settings stay."""
    suites = load(tmp_path, LAYERS).suites
    longer = suites["longer"]
    assert longer.description == "b"
    assert [task.id for task in longer.tasks] == [task.id for task in suites["base"].tasks]
    assert [task.steps for task in longer.tasks] == [1000, 300, 300]
    assert {task.start for task in longer.tasks} == {"backup"}
    assert longer.tasks[0].config == {
        "ppo": {"gamma": 0.5, "n_steps": 20},
        "cpo": {"gamma": 0.9},
    }
    assert [task.config.get("cpo") for task in suites["base"].tasks] == [None] * 3


def test_tasks_of_an_extending_suite_choose_among_the_others(tmp_path):
    """A task that is named again keeps its settings; a new one has those of the suite."""
    goal2, ant = load(tmp_path, LAYERS).suites["fewer"].tasks
    assert (goal2.id, goal2.steps, goal2.num_envs, goal2.seeds) == (
        "SafetyPointGoal2-v0",
        300,
        1,
        1,
    )
    assert goal2.config["ppo"] == {"gamma": 0.5, "n_steps": 20, "batch_size": 5}
    assert (ant.id, ant.steps, ant.num_envs) == ("SafetyAntVelocity-v1", 1000, 4)


def test_extended_suites_cannot_fill_the_memory(tmp_path):
    """Each suite would repeat the first one's configuration and tasks: bounded as written out."""
    config = ", ".join(f"x{i}: 1" for i in range(500))
    head = "version: 1\nsuites:\n  s0: {description: d, seeds: 1, steps: 1, agents: [ppo], "
    first = f"tasks: [SafetyAntVelocity-v1], config: {{ppo: {{{config}}}}}}}\n"
    others = "".join(f"  s{i}: {{extends: s{i - 1}}}\n" for i in range(1, 1000))
    with pytest.raises(
        UserError, match="more than 100000 values, with extended suites written out"
    ):
        load(tmp_path, head + first + others)


def test_comparison_runs_the_suites_cells(tmp_path):
    """`compare` runs a task exactly as the first suite with it does: start policy, envs, all."""
    benchmarks = load(tmp_path, LAYERS)
    name, suite = comparison(benchmarks, ["ppo", "cpo"], "SafetyPointGoal2-v0", 2, None, None)
    assert name == "compare-SafetyPointGoal2-v0"
    (expected,) = (entry for entry in benchmarks.suites["base"].tasks if "Goal2" in entry.id)
    assert expected.start == "backup"  # losing it would start the compared agents unsafely
    assert cells(suite) == cells(Suite("d", [expected]))
    _, changed = comparison(benchmarks, ["ppo"], "SafetyPointGoal2-v0", 1, 50, 3.0)
    (cell,) = cells(changed)
    assert (cell.steps, cell.cost_limit, cell.start) == (50, 3.0, "backup")


def test_comparison_on_a_task_of_no_suite(tmp_path):
    """Plain defaults and the task's own limit; another package's task needs a limit."""
    benchmarks = load(tmp_path, VALID)
    _, suite = comparison(benchmarks, ["ppo"], "SafetyAntVelocity-v1", 1, None, None)
    (cell,) = cells(suite)
    assert (cell.steps, cell.num_envs, cell.cost_limit, cell.config) == (100_000, 4, 25.0, {})
    with pytest.raises(UserError, match="--cost-limit: needed, since CartPole-v1 is no task"):
        comparison(benchmarks, ["ppo"], "CartPole-v1", 1, None, None)
    with pytest.raises(UserError, match=r"compare: cost_limit: Input should be .*, got nan"):
        comparison(benchmarks, ["ppo"], "CartPole-v1", 1, None, float("nan"))


def test_run_folders_stay_inside_the_results(tmp_path):
    """Names with slashes or dots cannot lead out of the folder."""
    cell = cells(get_suite(load(tmp_path, VALID), "core"))[0].model_copy(
        update={"agent": "../../x:Y", "task": "../t"}
    )
    assert run_folder(tmp_path, "core", cell).resolve().is_relative_to(tmp_path / "core")


# SHA-256 of the keys of each suite's cells, in order. A changed key means that the records of the
# suite no longer count: change a digest here only together with the suite, knowingly.
DIGESTS = {
    "quick": "77e663910b15415a",
    "paper": "bb0a84cfc0957f01",
    "paper-total": "9b30158779ef5b8c",
    "scpo-rl": "cae3dd5d264c58c5",
    "safety-smoke": "d00e36d635e9c783",
    "safety-velocity": "11dfe692ea6cf094",
    "safety-velocity-1e7": "b5b7d96431178fc3",
    "safety-navigation": "8a5b778cc148d647",
    "safety-navigation-1e7": "6e8050d6db421401",
}


def test_committed_suites_keep_their_cells():
    """However benchmarks.yaml is written, its cells stay those that the records were made with."""
    suites = load_benchmarks(ROOT / "benchmarks.yaml").suites
    found = {name: "".join(cell.key() for cell in cells(s)) for name, s in suites.items()}
    assert {n: hashlib.sha256(k.encode()).hexdigest()[:16] for n, k in found.items()} == DIGESTS


def test_committed_suites_keep_to_the_protocol():
    """docs/protocol.md: told limit = judged limit, and one margin for all agents of a task.

    The exceptions are few, and in each the table shows another margin. The records of scpo-rl are
    from before.
    """
    suites = load_benchmarks(ROOT / "benchmarks.yaml").suites
    names = suites.keys() - {"scpo-rl"}
    planned = [cell for name in names for cell in cells(suites[name], seeds=1)]
    assert not [cell for cell in planned if "cost_limit" in cell.config]
    own = {cell.agent for cell in planned if "margin" in cell.config}
    assert own == {"scpo-certified", "penalty"}


def test_committed_records_are_of_the_suites_cells():
    """Every record in results/ belongs to a cell of its suite, in the folder of that cell."""
    suites = load_benchmarks(ROOT / "benchmarks.yaml").suites
    planned = {
        run_folder(ROOT / "results", name, cell): cell.key()
        for name, suite in suites.items()
        for cell in cells(suite)
    }
    folders = run_folders(ROOT / "results")
    assert len(folders) > 300
    assert {folder: read_run(folder).key for folder in folders}.items() <= planned.items()


def test_the_package_carries_the_committed_file():
    """`scpo-bench` outside of the repository runs the same suites."""
    assert PACKAGED_FILE.read_bytes() == (ROOT / "benchmarks.yaml").read_bytes()


def test_files_without_an_end_and_not_in_utf8(tmp_path):
    """Devices are not read, and of plain files no more than the bound."""
    with pytest.raises(UserError, match=r"zero: not a plain file"):
        load_benchmarks(Path("/dev/zero"))
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(1_000_000_000)
    with pytest.raises(UserError, match=r"large\.yaml: larger than"):
        load_benchmarks(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes("version: 1 # ä".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: not valid YAML \('utf-8' codec"):
        load_benchmarks(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="not a plain file"):
        load_benchmarks(tmp_path)


def test_a_billion_runs_are_refused(tmp_path):
    """A mistyped number must be refused before it fills the memory."""
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
    "*ppo",
    "&x [*x]",
    "<<: *ppo",
    "extends: base",
    "extends: fewer",
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
    """Whatever a file contains, the outcome is cells with keys, or one line with the problem."""
    rng = random.Random(5)
    path = tmp_path / "benchmarks.yaml"
    committed = (ROOT / "benchmarks.yaml").read_text()
    small = LAYERS.replace("{gamma: 0.5, n_steps: 10}", "&ppo {gamma: 0.5, n_steps: 10}")
    loaded, refusals = 0, set()
    for i in range(FUZZ_FILES):
        # The committed file is slow to read, so most mutations are of a small one.
        text = mutate(committed if i % 20 == 0 else small, rng)
        path.write_bytes(text.encode("utf-8" if rng.random() < 0.95 else "utf-16", "surrogatepass"))
        try:
            for suite in load_benchmarks(path).suites.values():
                for cell in cells(suite):
                    assert len(cell.key()) == 64
            loaded += 1
        except UserError as error:
            refusals.add(str(error))
    assert 0 < loaded < FUZZ_FILES
    assert len(refusals) > FUZZ_FILES / 10
    assert all(refusal.isprintable() and len(refusal) < 700 for refusal in refusals)
