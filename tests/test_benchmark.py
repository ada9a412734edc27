"""benchmarks.yaml: every mistake is one line that names the field; cells have content keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scpo_bench.benchmark import BenchmarkError, cells, comparison, get_suite, load_benchmarks, run_folder

ROOT = Path(__file__).parent.parent
VALID = {
    "version": 1,
    "suites": {
        "core": {
            "description": "d",
            "seeds": 2,
            "tasks": [{"id": "scpo_bench/HarmfulRegression-v0", "agents": ["scpo", "ppo"], "steps": 100}],
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
        (changed("suites", "core", "seed", 3), r"suites\.core\.seed: unknown key; did you mean 'seeds'\?"),
        (changed(*TASK, "steps", "many"), r"tasks\[0\]\.steps: input should be a valid integer.*got 'many'"),
        (changed(*TASK, "steps", 0), r"tasks\[0\]\.steps: input should be greater than or equal to 1, got '0'"),
        (changed(*TASK, "start", "bakcup"), r"tasks\[0\]\.start: input should be 'backup' or 'random'"),
        (changed("suites", "core", "config", {"cpo": {}}), r"config: 'cpo' runs in no task of the suite"),
        (changed(*TASK, "config", {"sgd": {}}), r"tasks\[0\]\.config: 'sgd' is not among its agents"),
        (changed(*TASK, "id", "CartPole-v1"), r"tasks\[0\]\.cost_limit: needed, since CartPole-v1"),
        (changed("version", 2), "version: input should be 1"),
        ("suites: [", "not valid YAML"),
        ("version: 1\nsuites: {a: {x: 1}, a: {x: 2}}", "line 2: 'a' stands twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("just text", "file: input should be a valid dictionary"),
        ("\x00", "not valid YAML"),
    ],
)
def test_mistakes_are_one_line(tmp_path, data, message):
    """File, field, expectation, what came, nearest choice - and never a traceback of another kind."""
    with pytest.raises(BenchmarkError, match=message) as caught:
        load(tmp_path, data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("benchmarks.yaml: ")


def test_cells_merge_configuration_and_take_the_tasks_cost_limit(tmp_path):
    """Suite-wide settings, then the task's; limit 0 is the custom task's own; seeds count from 0."""
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
    with pytest.raises(BenchmarkError, match="--agents: unknown agent 'ppoo'; did you mean 'ppo'"):
        cells(suite, ["ppoo"])
    with pytest.raises(BenchmarkError, match="--tasks: the suite has no task"):
        cells(suite, tasks=["scpo_bench/HarmfulRegresion-v0"])
    with pytest.raises(BenchmarkError, match="unknown suite 'coer'; did you mean 'core'"):
        get_suite(load(tmp_path, VALID), "coer")


def test_comparison_uses_the_suites_settings(tmp_path):
    """`compare` runs a task the way the suites do, unless told otherwise."""
    name, suite = comparison(load(tmp_path, VALID), ["ppo"], "scpo_bench/HarmfulRegression-v0", 1, 50, None)
    (cell,) = cells(suite)
    assert name == "compare-scpo_bench.HarmfulRegression-v0"
    assert (cell.steps, cell.config) == (50, {"n_steps": 10})


def test_run_folders_stay_inside_the_results(tmp_path):
    """Names with slashes or dots cannot lead out of the folder."""
    cell = cells(get_suite(load(tmp_path, VALID), "core"))[0].model_copy(update={"agent": "../../x:Y", "task": "../t"})
    assert run_folder(tmp_path, "core", cell).resolve().is_relative_to(tmp_path / "core")


def test_committed_file_is_valid_and_packaged():
    """The repository's suites load, and the package carries the same file."""
    assert {"quick", "paper"} <= set(load_benchmarks(ROOT / "benchmarks.yaml").suites)
    assert (ROOT / "scpo_bench" / "benchmarks.yaml").read_bytes() == (ROOT / "benchmarks.yaml").read_bytes()
