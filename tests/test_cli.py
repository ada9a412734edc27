"""The command line as a user sees it: light help, one-line errors with status 2, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = [str(Path(sys.executable).with_name("scpo-bench"))]  # the installed script itself
RUN_SMALL = ["compare", "ppo", "--task", "scpo_bench/HarmfulRegression-v0", "--seeds", "1"]


def scpo_bench(*arguments, cwd=None, expect=0):
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == expect, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_help_names_every_command_and_imports_nothing_heavy():
    """`--help` must answer at once: what is heavy is imported by the command that needs it."""
    program = """
import sys
from scpo_bench.cli import main
sys.argv = ["scpo-bench", "--help"]
try:
    main()
finally:
    heavy = "torch pandas mujoco pydantic scipy stable_baselines3 rich yaml matplotlib".split()
    print("imported:", [name for name in heavy if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "imported: []" in result.stdout
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    commands = "list run compare show leaderboard plot verify bundle check falsify doctor"
    assert set(commands.split()) <= set(listed)


def test_help_shows_the_defaults():
    """Square brackets in a help text are text: none of them may be taken for markup."""
    for command, default in (
        ("run", "[default: the suite's]"),
        ("run", "[default: ./benchmarks.yaml, else the packaged one]"),
        ("run", "[default: results]"),
        ("compare", "[default: a suite's, or 100000]"),
        ("plot", "[default: RESULTS/SUITE/plots]"),
        ("bundle", "[default: SUITE.tar.gz]"),
    ):
        assert default in " ".join(scpo_bench(command, "--help").stdout.split()), command


def test_show_answers_on_the_command_line():
    """`show RUN --update K` is the one command for: did update K violate, and by which rule?"""
    run = "results/paper/scpo_bench.DoubleIntegratorImitation-v0/cpo/seed-3"
    shown = " ".join(scpo_bench("show", run, "--update", "111", cwd=ROOT).stdout.split())
    assert "verdict violates: worst constraint value 0.0" in shown
    assert "`--update 111` shows the first of them" in scpo_bench("show", run, cwd=ROOT).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quikc"], "unknown suite 'quikc'; did you mean 'quick'?"),
        (["run", "quick", "--agents", "spco"], "unknown agent 'spco'; did you mean 'scpo'?"),
        (["run", "quick", "--tasks", "SafetyPointGoal2-v0"], "the suite has no task"),
        (["run", "quick", "--agents", "no_such_module:Agent"], "cannot import 'no_such_module'"),
        (["run", "quick", "--agents", "no_such_file.py:Agent"], "no file no_such_file.py"),
        (
            ["run", "quick", "--agents", "stable_baselines3:PPPO"],
            "no class 'PPPO' in stable_baselines3; did you mean 'PPO'?",
        ),
        (["run", "quick", "--file", "no.yaml"], "no.yaml: cannot be read"),
        (["run", "quick", "--results", "/dev/null/x"], "--results: cannot write"),
        (
            ["compare", "scpo", "--task", "scpo_bench/HarmfulRegresion-v0"],
            "did you mean 'scpo_bench/HarmfulRegression-v0'?",
        ),
        (["leaderboard", "quick", "--results", "nowhere"], "no records of suite 'quick'"),
        (["plot", "quick", "--results", "nowhere"], "no records of suite 'quick'"),
        (["run", "other", "--file", "other.yaml"], "other.yaml: suites.other: unknown key 'seed'"),
        (["show", "nowhere"], "no run in 'nowhere'"),
        (["run"], "Missing argument"),
        (["run", "quick", "--jobs", "0"], "--jobs"),
    ],
)
def test_bad_input_gets_one_clear_line_and_status_2(arguments, message, tmp_path):
    """Wrong names, files and values: what was wrong, what would be right, and no traceback."""
    (tmp_path / "other.yaml").write_text("version: 1\nsuites: {other: {seed: 1}}")
    result = scpo_bench(*arguments, cwd=tmp_path, expect=2)
    assert message in " ".join(result.stderr.split())


def test_compare_runs_and_prints_a_table(tmp_path):
    """From the command to the table; the second call runs nothing."""
    small = [*RUN_SMALL, "--steps", "640", "--results", tmp_path]
    first = scpo_bench(*small, cwd=tmp_path)
    assert "1 run, 0 already there, 0 failed" in first.stdout
    assert "ppo" in first.stdout
    assert "0 run, 1 already there" in scpo_bench(*small, cwd=tmp_path).stdout
    for name in ("md", "csv", "json"):
        assert "ppo" in scpo_bench("leaderboard", "--results", tmp_path, "--format", name).stdout
    figures = scpo_bench(
        "plot", "compare-scpo_bench.HarmfulRegression-v0", "--results", tmp_path
    ).stdout.split()
    assert figures
    assert all(Path(figure).stat().st_size > 5000 for figure in figures)


def test_third_party_agent_from_a_file(tmp_path):
    """A class in the user's file is compared without editing the package."""
    (tmp_path / "mine.py").write_text(
        "from stable_baselines3 import A2C\n\n\nclass Mine(A2C):\n    pass\n"
    )
    arguments = [
        "compare",
        "mine.py:Mine",
        "--task",
        "scpo_bench/HarmfulRegression-v0",
        "--seeds",
        "1",
        "--steps",
        "640",
    ]
    assert "1 run" in scpo_bench(*arguments, "--results", tmp_path / "r", cwd=tmp_path).stdout


def test_unsafe_start_is_status_2(tmp_path):
    """SCPO from an unsafe start policy: one line for all seeds: which constraint, which value."""
    (tmp_path / "benchmarks.yaml").write_text(
        """
version: 1
suites:
  s:
    description: d
    agents: [scpo]
    seeds: 2
    steps: 60
    num_envs: 2
    tasks: [scpo_bench/DoubleIntegratorImitation-v0]
"""
    )
    result = scpo_bench("run", "s", cwd=tmp_path, expect=2)
    assert result.stdout.count("the start policy is unsafe: constraint") == 1
    assert "> 0" in result.stdout


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_keeps_the_record_and_says_how_to_resume(tmp_path, sent, jobs):
    """A run interrupted in the middle: status 130, a readable record, nothing else printed.

    Schedulers send SIGTERM instead.
    """
    arguments = [
        *COMMAND,
        *RUN_SMALL,
        "--steps",
        "64000",
        "--results",
        str(tmp_path),
        "--jobs",
        jobs,
    ]
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests started in the background inherit an ignored SIGINT; a user's shell passes it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(
        p.stat().st_size for p in tmp_path.rglob("updates.jsonl")
    ):
        time.sleep(0.1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert not err
    assert "interrupted; nothing is lost, run the same command again to resume" in out
    run_file = next(tmp_path.rglob("run.json"))
    assert '"status": "interrupted"' in run_file.read_text()


def test_list_and_doctor():
    """`list` shows everything that can be named, and `doctor` whether this machine can run it."""
    assert "scpo_bench/DoubleIntegratorImitation-v0" in scpo_bench("list", "tasks").stdout
    assert "ppo-lagrangian" in scpo_bench("list", "agents").stdout
    assert "paper" in scpo_bench("list", "suites").stdout
    assert "torch" in scpo_bench("doctor").stdout


def test_workers_know_the_tasks_and_give_the_same_record(tmp_path):
    """--workers, as a user gives it: tasks are registered in the other processes, too."""
    (tmp_path / "suites.yaml").write_text(
        """
version: 1
suites:
  tiny:
    description: two processes
    agents: [ppo, scpo-ppo]
    seeds: 1
    steps: 400
    num_envs: 2
    evaluation_episodes: 1
    config: {ppo: {n_steps: 200}, scpo-ppo: {n_steps: 200, rollouts: 2}}
    tasks: [SafetyHopperVelocity-v1]
"""
    )
    for workers in (1, 2):
        scpo_bench(
            "run",
            "tiny",
            "--file",
            "suites.yaml",
            "--workers",
            workers,
            "--results",
            workers,
            cwd=tmp_path,
        )
    one, two = (
        [
            json.loads(file.read_text())["digest"]
            for file in sorted((tmp_path / n).rglob("run.json"))
        ]
        for n in "12"
    )
    assert one == two
    assert len(one) == 2
