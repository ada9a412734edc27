"""Tunes the agents of a suite: equally many trials for each, on seeds and starts of their own.

A trial is one configuration, run with every tuning seed. Trial 0 is the suite's own configuration;
the others are drawn by Optuna's TPE sampler from the search space beside the agent's Config. What
counts is first the share of iterates that violate, then the final objective (or return). Given the
trials so far the next one is determined, so that a command that was interrupted goes on where it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from scpo_bench.configuration import Range, SearchSpace
from scpo_bench.errors import UserError
from scpo_bench.records.files import RecordError, file_name, read_run, read_updates
from scpo_bench.records.plain_files import check_writable, make_folder
from scpo_bench.records.schema import Cell, Update
from scpo_bench.records.study import STUDY_FILE, Study, Trial, write_study
from scpo_bench.runs.launch import run_cells
from scpo_bench.runs.provenance import provenance
from scpo_bench.suites.cells import run_folder
from scpo_bench.suites.registry import load_agent

FIRST_SEED = 100
"""Tuning seeds are this and up; suites use 0 and up."""
SAMPLER = "optuna TPE, 5 random trials first"
RANDOM_TRIALS = 5


def search_space(agent: str) -> SearchSpace:
    """The fields that are tuned of an agent; empty if it states none."""
    config_class = getattr(load_agent(agent), "Config", None)
    return getattr(config_class, "search_space", {})


def tune(
    cell: Cell,
    trials: int,
    seeds: int,
    folder: Path,
    jobs: int,
    console: Console,
    report: Callable[[str], None] = lambda line: None,
) -> Study:
    """The study of ``cell``'s agent on its task; tuning.json is written after every trial.

    cell: as the suite plans it; its seed and its evaluation starts are replaced. seeds: runs per
    trial. folder: of the trials' runs and of tuning.json. report: called with a line of text per
    trial. UserError if Optuna is not installed, or if the agent has no search space.
    """
    space = search_space(cell.agent)
    if not space:
        raise UserError(f"agent '{cell.agent}': its Config has no search_space to tune in")
    planned = cell.model_copy(update={"seed": FIRST_SEED, "evaluation_starts": "tuning"})
    done: list[Trial] = []
    for config, tell in _proposals(space, planned, trials):
        runs = [
            planned.model_copy(
                update={"seed": FIRST_SEED + i, "config": {**planned.config, **config}}
            )
            for i in range(seeds)
        ]
        name = f"trial-{len(done):03d}"
        run_cells(runs, name, folder, jobs, console)
        done.append(_outcome(config, [run_folder(folder, name, run) for run in runs]))
        tell(done[-1])
        study = Study(
            cell=planned, seeds=seeds, trials=done, sampler=SAMPLER, provenance=provenance()
        )
        write_study(folder, study)
        report(f"trial {len(done) - 1}: {trial_line(done[-1])}")
    return study


def tune_all(
    cells: Iterable[Cell],
    output: Path,
    trials: int,
    seeds: int,
    steps: int | None,
    jobs: int,
    console: Console,
) -> None:
    """Tune the agent of each cell, one after the other, and print what is found.

    Studies go to output/TASK/AGENT. steps: per run, by default the cell's. Agents without a search
    space are named and left as they are.
    """
    check_writable("--output", output)
    for cell in cells:
        place = f"{cell.agent} on {cell.task}"

        def say(line: str, place: str = place) -> None:
            text = f"{place}: {line}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        if not search_space(cell.agent):
            say("has no search space, left as it is")
            continue
        cell = cell.model_copy(update={"steps": steps or cell.steps})
        folder = output / file_name(cell.task) / file_name(cell.agent)
        make_folder(output, folder)
        study = tune(cell, trials, seeds, folder, jobs, console, say)
        say(f"best is {trial_line(study.best())}")
        say(f"study {folder / STUDY_FILE}; config {yaml_line(study)}")


def trial_line(trial: Trial) -> str:
    """A trial in one line of text."""
    set_to = ", ".join(f"{name}={_short(value)}" for name, value in trial.config.items())
    if trial.violating_share is None or trial.loss is None:
        return f"failed; {set_to or 'as in the suite'}"
    outcome = f"{100 * trial.violating_share:.3g} % of iterates violate, loss {trial.loss:.4g}"
    return f"{outcome}; {set_to or 'as in the suite'}"


def yaml_line(study: Study) -> str:
    """The agent's configuration for the suites file, with the best trial's values."""
    chosen = {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in study.best().config.items()
    }
    config = {**study.cell.config, **chosen}
    text = yaml.safe_dump(config, default_flow_style=True, sort_keys=False, width=10**6)
    return f"{study.cell.agent}: {text.strip()}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _proposals(
    space: SearchSpace, cell: Cell, trials: int
) -> Iterator[tuple[dict[str, Any], Callable[[Trial], None]]]:
    """(fields to set, what to call with the outcome) of each trial in turn."""
    optuna = _optuna()
    # One study per agent and task, whatever others are tuned beside it.
    text = f"{cell.agent} {cell.task}".encode()
    seed = int(np.random.SeedSequence(list(text)).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {name: _distribution(values) for name, values in space.items()}
    yield {}, lambda outcome: None
    for _ in range(trials - 1):
        asked = study.ask(distributions)

        def tell(outcome: Trial, asked: Any = asked) -> None:
            if outcome.loss is None:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
                return
            asked.set_constraint("violating share", outcome.violating_share)
            study.tell(asked, outcome.loss)

        yield dict(asked.params), tell


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("tune: needs Optuna; pip install 'scpo-bench[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(values: Range | tuple[Any, ...]) -> Any:
    optuna = _optuna()
    if not isinstance(values, Range):
        return optuna.distributions.CategoricalDistribution(values)
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    kind = "IntDistribution" if whole else "FloatDistribution"
    return getattr(optuna.distributions, kind)(values.low, values.high, log=values.log)


def _outcome(config: dict[str, Any], folders: list[Path]) -> Trial:
    """What a trial's runs came to; one that failed counts as failed for all of them."""
    evaluated: list[Update] = []
    losses = []
    for folder in folders:
        try:
            run, updates = read_run(folder), read_updates(folder)
        except RecordError:
            return Trial(config=config)
        iterates = [u for u in updates[1:] if u.iterate_return is not None]
        if run.status != "finished" or not iterates:
            return Trial(config=config)
        last = iterates[-1]
        evaluated += iterates
        negated = -(last.iterate_return or 0.0)
        losses.append(negated if last.iterate_objective is None else last.iterate_objective)
    share = sum(bool(u.iterate_violates) for u in evaluated) / len(evaluated)
    return Trial(config=config, violating_share=share, loss=float(np.mean(losses)))
