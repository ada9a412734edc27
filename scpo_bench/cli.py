"""The command line: argument handling and printing.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Safe-RL benchmark: what happens to safety at every policy update.",
)

ResultsOption = Annotated[Path, typer.Option("--results", help="Folder of run records.")]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", help="Suites file [default: ./benchmarks.yaml, else the packaged one]."),
]
JobsOption = Annotated[
    int, typer.Option("--jobs", "-j", min=1, help="Runs at a time, one process each.")
]
WorkersOption = Annotated[
    int,
    typer.Option(
        min=1, help="Processes that step the environments of one run; the record is the same."
    ),
]
SeedsOption = Annotated[
    int | None,
    typer.Option("--seeds", min=1, help="Seeds per agent and task [default: the suite's]."),
]


class Listing(enum.StrEnum):
    tasks = "tasks"
    agents = "agents"
    suites = "suites"


class TableFormat(enum.StrEnum):
    table = "table"
    md = "md"
    latex = "latex"
    csv = "csv"
    json = "json"
    html = "html"


def _console() -> Any:
    from rich.console import Console

    # A pipe or a log file has no width of its own: 120 columns hold the leaderboard.
    return Console(width=None if sys.stdout.isatty() else 120)


def _names(values: list[str] | None) -> list[str] | None:
    """``--agents scpo,sgd --agents ppo`` -> ["scpo", "sgd", "ppo"]."""
    return [name for value in values for name in value.split(",") if name] if values else None


def _benchmarks(file: Path | None) -> Any:
    from scpo_bench.suites.schema import default_file, load_benchmarks

    return load_benchmarks(file or default_file())


@app.command("list")
def list_(
    what: Annotated[Listing, typer.Argument(help="tasks, agents or suites")],
    file: FileOption = None,
) -> None:
    """What can be run."""
    from rich.table import Table

    from scpo_bench.suites import registry

    table = Table(box=None, pad_edge=False)
    if what is Listing.agents:
        for column in ("agent", "what it is", "needs"):
            table.add_column(column)
        for agent in registry.agents().values():
            needs = ["labels"] * agent.needs_labels + ["batched task"] * agent.needs_batched
            table.add_row(agent.name, agent.summary, ", ".join(needs))
    elif what is Listing.suites:
        for column in ("suite", "tasks", "agents", "seeds", "description"):
            table.add_column(column)
        for name, suite in _benchmarks(file).suites.items():
            agents = dict.fromkeys(agent for entry in suite.tasks for agent in entry.agents)
            counts = {entry.seeds or suite.seeds for entry in suite.tasks}
            seeds = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
            table.add_row(name, str(len(suite.tasks)), " ".join(agents), seeds, suite.description)
    else:
        for column in ("family", "task", "horizon", "cost limit", ""):
            table.add_column(column)
        previous = None
        for task in registry.tasks().values():
            family = task.family if task.family != previous else ""
            table.add_row(family, task.id, str(task.horizon), f"{task.cost_limit:g}", task.summary)
            previous = task.family
    _console().print(table)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="Name of a suite; `list suites` shows them.")],
    agents: Annotated[
        list[str] | None,
        typer.Option(help="Only these (comma-separated); module:Class adds yours."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Only these tasks (comma-separated).")
    ] = None,
    seeds: SeedsOption = None,
    jobs: JobsOption = 1,
    workers: WorkersOption = 1,
    results: ResultsOption = Path("results"),
    file: FileOption = None,
) -> None:
    """Run a suite.

    Finished runs are kept and not run again; a run that was stopped or killed goes on where it was.
    """
    from scpo_bench.suites.cells import cells, get_suite

    chosen = get_suite(_benchmarks(file), suite)
    _run(cells(chosen, _names(agents), _names(tasks), seeds), suite, results, jobs, workers)


def _run(todo: list[Any], suite: str, results: Path, jobs: int, workers: int = 1) -> None:
    from scpo_bench.runs.launch import run_cells
    from scpo_bench.runs.processes import sigterm_interrupts
    from scpo_bench.suites.registry import load_agent

    sigterm_interrupts()
    console = _console()
    for name in dict.fromkeys(cell.agent for cell in todo if ":" in cell.agent):
        load_agent(name)  # a mistyped module:Class is one error now, not one per run
    try:
        outcome = run_cells(todo, suite, results, jobs, console, workers)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is lost, the same command goes on from here")
        raise typer.Exit(130) from None
    console.print(
        f"{outcome.finished} run, {outcome.skipped} already there, {len(outcome.failed)} failed; records in {results / suite}",
        highlight=False,
    )
    if outcome.failed:
        raise typer.Exit(2 if all(failure.users_mistake for failure in outcome.failed) else 1)


@app.command()
def compare(
    agents: Annotated[
        list[str], typer.Argument(help="Agents to compare, by name or module:Class.")
    ],
    task: Annotated[str, typer.Option(help="Gymnasium id.")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Interaction steps per run [default: as in suite quick, or 100000]."
        ),
    ] = None,
    jobs: JobsOption = 1,
    results: ResultsOption = Path("results"),
    cost_limit: Annotated[
        float | None, typer.Option(min=0, help="Cost per episode [default: the task's].")
    ] = None,
    file: FileOption = None,
) -> None:
    """Run agents on one task and print the table."""
    from scpo_bench.suites.cells import cells, comparison, run_folder

    suite_name, suite = comparison(_benchmarks(file), agents, task, seeds, steps, cost_limit)
    todo = cells(suite)
    try:
        _run(todo, suite_name, results, jobs)
    finally:
        if any(run_folder(results, suite_name, cell).exists() for cell in todo):
            leaderboard(suite_name, results, TableFormat.table, file)


@app.command()
def leaderboard(
    suite: Annotated[str | None, typer.Argument(help="Only this suite.")] = None,
    results: ResultsOption = Path("results"),
    format: Annotated[TableFormat, typer.Option(help="Output format.")] = TableFormat.table,
    file: FileOption = None,
) -> None:
    """The table of all records: feasibility first, then return."""
    from scpo_bench.errors import UserError
    from scpo_bench.leaderboard import render, tables
    from scpo_bench.suites.cells import cells

    suites = _benchmarks(file).suites
    names = (
        [suite]
        if suite
        else sorted(p.name for p in results.iterdir() if p.is_dir())
        if results.is_dir()
        else []
    )
    if format is TableFormat.html and suite and (results / suite).is_dir():
        from scpo_bench.leaderboard.page import render_page

        typer.echo(render_page(results, suite, cells(suites[suite]) if suite in suites else None))
        return
    if format is TableFormat.html:
        raise UserError("--format html: needs the name of one suite that has records")
    shown = 0
    for name in names:
        planned = cells(suites[name]) if name in suites else None
        if not (results / name).is_dir():
            continue
        table = tables.leaderboard(tables.load(results, name, planned))
        if format is TableFormat.table:
            render.print_table(table, _console(), title=name)
        else:
            typer.echo(render.render(table, format.value, title=name))
        shown += 1
    if not shown:
        hint = f"`scpo-bench run {suite or 'SUITE'} --results {results}` makes some"
        raise UserError(
            f"no records{f' of suite {suite!r}' if suite else ''} in '{results}'; {hint}"
        )


@app.command()
def plot(
    suite: Annotated[str, typer.Argument(help="Suite whose records to plot.")],
    results: ResultsOption = Path("results"),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the figures [default: RESULTS/SUITE/plots]."
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="png, svg or pdf (comma-separated).")] = "png",
    file: FileOption = None,
) -> None:
    """Figures per update (objective, worst constraint value, violations), SCPO's certificate, and
    the performance profile.
    """
    from scpo_bench.errors import UserError
    from scpo_bench.leaderboard import plots
    from scpo_bench.suites.cells import cells

    formats = tuple(format.split(","))
    for name in formats:
        if name not in ("png", "svg", "pdf"):
            raise UserError(f"--format: expected png, svg or pdf, got '{name}'")
    if not (results / suite).is_dir():
        raise UserError(f"no records of suite '{suite}' in '{results}'")
    suites = _benchmarks(file).suites
    planned = cells(suites[suite]) if suite in suites else None
    for path in plots.plot_suite(
        results, suite, output or results / suite / "plots", formats, planned
    ):
        typer.echo(path)


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(help="A results folder, a run folder or a bundle (.tar.gz).")
    ],
    rerun: Annotated[
        bool,
        typer.Option("--rerun", help="Run the cells again and compare; runs the agents' code."),
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="With --rerun: only this many runs, drawn at random.")
    ] = None,
) -> None:
    """Check records: schema, digests, every aggregate recomputed; with --rerun, whether they can be
    reproduced.
    """
    from scpo_bench.submissions import verify as verification

    report = verification.verify(folder)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)
    if rerun:
        from scpo_bench.submissions.reproduce import reproduce

        differing = 0
        for run_folder, differences in reproduce(folder, sample):
            differing += bool(differences)
            typer.echo(
                f"{run_folder}: "
                + ("; ".join(differences[:3]) if differences else "reproduced exactly")
            )
        typer.echo(
            "tier: "
            + ("reproduced-exact" if not differing else f"consistent ({differing} runs differ)")
        )
        if differing:
            raise typer.Exit(1)


@app.command()
def bundle(
    suite: Annotated[str, typer.Argument(help="Suite whose records to pack.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .tar.gz or a new folder [default: SUITE.tar.gz]."),
    ] = None,
    results: ResultsOption = Path("results"),
    file: FileOption = None,
) -> None:
    """Pack a suite's records for submission: records, configuration, provenance; no code, no
    pickles.
    """
    from scpo_bench.submissions import bundle as packing
    from scpo_bench.suites.cells import cells

    suites = _benchmarks(file).suites
    planned = cells(suites[suite]) if suite in suites else []
    typer.echo(packing.bundle(results, suite, output or Path(f"{suite}.tar.gz"), planned))


@app.command()
def check(
    agent: Annotated[
        str, typer.Argument(help="module:Class, path/file.py:Class or a registered name.")
    ],
    config: Annotated[
        str, typer.Option(help='Fields of its configuration, as JSON: {"n_steps": 100}.')
    ] = "{}",
    steps: Annotated[
        int, typer.Option(min=100, help="Interaction steps to learn in, at most.")
    ] = 100_000,
) -> None:
    """Conformance test: spaces, step budget, learning, determinism, going on after a stop, save and
    load.
    """
    import shutil
    import tempfile

    from rich.console import Console

    from scpo_bench.checks.conformance import check as findings

    fields = _json_object("--config", config)
    folder = Path(tempfile.mkdtemp(prefix="scpo-bench-check-"))
    terminal = Console(stderr=True)
    failed = 0
    try:
        status = terminal.status("starting")

        def show(doing: str, taken: int, updates: int) -> None:
            status.update(f"{doing}: {taken:,} steps, {updates} updates")

        remaining = findings(agent, fields, steps, folder, show)
        while True:
            with status:  # not while a line is printed: the two may share a terminal
                found = next(remaining, None)
            if found is None:
                break
            failed += found.ok is False
            word = "ok    " if found.ok else "FAILED" if found.ok is False else "?     "
            typer.echo(f"{word} {found.name}: {found.detail}")
        typer.echo(
            f"{agent}: {'conforms' if not failed else f'{failed} failed; records in {folder}'}"
        )
    finally:
        if not failed:  # else they, and their tracebacks, are what to look at next
            shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise typer.Exit(1)


def _json_object(option: str, text: str) -> dict[str, Any]:
    import json

    from scpo_bench.errors import UserError

    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"{option}: expected a JSON object such as '{{\"n_steps\": 100}}', got '{text[:40]}'"
        )
    return value


@app.command()
def falsify(
    task: Annotated[
        str, typer.Option(help="known-smoothness, or a labelled task of pure-function dynamics.")
    ] = "known-smoothness",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    updates: Annotated[
        int, typer.Option(min=1, help="Updates per seed whose policies are examined.")
    ] = 40,
    output: Annotated[
        Path, typer.Option(help="Folder for the figure and the counterexample.")
    ] = Path("falsify"),
    replay: Annotated[
        Path | None, typer.Option(help="A counterexample file: compute it again, and nothing else.")
    ] = None,
) -> None:
    """Search for certified SCPO updates that exceed their bound.

    Exit status 1: the guarantee is falsified.
    """
    from rich.progress import Progress

    from scpo_bench.checks import counterexample
    from scpo_bench.checks import falsify as search
    from scpo_bench.checks.falsify_figure import draw

    if replay is not None:
        found = counterexample.load(replay)
        bound, realised = search.replay(found)
        for name, a, b in zip(
            ("bound", "realised"), (found.bound, found.realised), (bound, realised)
        ):
            typer.echo(
                f"{name:9} then {' '.join(f'{v:.6g}' for v in a)}   now {' '.join(f'{v:.6g}' for v in b)}"
            )
        breached = bool((realised > bound).any())
        typer.echo("it breaches" if breached else "it does not breach")
        raise typer.Exit(0 if breached else 1)
    with Progress(transient=True, disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task("")
        report = search.falsify(
            task,
            seeds,
            updates,
            lambda what, done, of: bar.update(line, description=what, completed=done, total=of),
        )
    typer.echo(f"{'factor on L':>12}  {'breaches':>8} of {'steps':>6}")
    for factor, (breaches, steps) in report.by_factor().items():
        typer.echo(
            f"{factor:12g}  {breaches:8} of {steps:6}  {100 * breaches / max(steps, 1):5.1f} %"
        )
    for rule, (breaches, of) in report.rules.items():
        typer.echo(
            f"the agent, certified mode, {rule} L: {breaches} breaches in {of} updates, {100 * breaches / max(of, 1):.1f} %"
        )
    name = "".join(c if c.isalnum() or c in "-_." else "." for c in task)
    draw(report, output / f"{name}.png")
    typer.echo(f"figure: {output / f'{name}.png'}")
    if report.counterexample is not None:
        path = output / f"{name}.json"
        counterexample.save(report.counterexample, path)
        found = report.counterexample
        typer.echo(
            f"smallest counterexample: |step| {found.step_norm:.3g}, exceeds its bound by {found.excess:.3g}, factor "
            f"{found.setting.factor:g}; repeat it with --replay {path}"
        )
    if report.falsified:
        typer.echo("FALSIFIED: a breach although L is known and not understated")
        raise typer.Exit(1)
    if report.known:
        typer.echo("no breach with a valid L")


@app.command()
def doctor() -> None:
    """Versions, what is missing, and how to get it."""
    from rich.table import Table

    from scpo_bench.runs.provenance import describe_environment

    rows = describe_environment()
    table = Table(box=None, pad_edge=False, show_header=False)
    for what, found, hint in rows:
        table.add_row(what, found, f"[yellow]{hint}[/yellow]" if hint else "[green]ok[/green]")
    _console().print(table)
    if any(hint for _, _, hint in rows):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, KeyError, OSError) as error:
        if not _is_users(error):
            raise
        typer.echo(f"scpo-bench: {error}", err=True)
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    from scpo_bench.errors import UserError
    from scpo_bench.records.files import RecordError

    return isinstance(error, UserError | UserError | UserError | RecordError | UserError)


if __name__ == "__main__":
    main()
