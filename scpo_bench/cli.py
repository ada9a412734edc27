"""The command line: argument handling and printing.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer import Argument, Option

from scpo_bench.errors import UserError, describe, nearest, printable
from scpo_bench.processes import open_streams

if TYPE_CHECKING:
    from rich.console import Console

    from scpo_bench.records.schema import Cell
    from scpo_bench.suites.schema import Benchmarks

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would read "[default: ...]" as markup and drop it
    help="Safe-RL benchmark: what happens to safety at every policy update.",
)

Names = list[str] | None
SuiteArgument = Annotated[str, Argument(help="Name of a suite; `list suites` shows them.")]
ResultsOption = Annotated[Path, Option("--results", help="Folder of run records.")]
FileOption = Annotated[
    Path | None,
    Option("--file", help="Suites file [default: ./benchmarks.yaml, else the packaged one]."),
]
JobsOption = Annotated[int, Option("--jobs", "-j", min=1, help="Runs at a time, in processes.")]

TrustOption = Annotated[
    bool, Option("--trust-code", help="Run agents and tasks of others that a record names.")
]

Listing = enum.StrEnum("Listing", ["tasks", "agents", "suites"])
TableFormat = enum.StrEnum("TableFormat", ["table", "md", "latex", "csv", "json", "html"])


def _console() -> Console:
    from rich.console import Console

    # A pipe or a log file has no width of its own: 120 columns hold the leaderboard.
    return Console(width=None if sys.stdout.isatty() else 120)


def _print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, show_header=any(columns))
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _names(values: list[str] | None) -> list[str] | None:
    """``--agents scpo,sgd --agents ppo`` -> ["scpo", "sgd", "ppo"]."""
    return [name for value in values for name in value.split(",") if name] if values else None


def _benchmarks(file: Path | None) -> Benchmarks:
    from scpo_bench.suites.schema import default_file, load_benchmarks

    return load_benchmarks(file or default_file())


def _suite_folder(results: Path, suite: str) -> Path:
    """The folder of a suite's records. UserError for a link, or if there is none."""
    from scpo_bench.records.files import check_suite_name
    from scpo_bench.records.plain_files import check_folder

    check_suite_name("SUITE", suite)
    try:
        check_folder(results / suite)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no records of suite '{suite}' in '{results}'") from None
    return results / suite


def _planned(benchmarks: Benchmarks, suite: str) -> list[Cell] | None:
    """The suite's cells, which the table compares with its records; None for an unlisted suite."""
    from scpo_bench.suites.cells import cells

    return cells(benchmarks.suites[suite]) if suite in benchmarks.suites else None


@app.command("list")
def list_(what: Annotated[Listing, Argument()], file: FileOption = None) -> None:
    """List what can be run: tasks, agents or suites."""
    from rich.markup import escape

    from scpo_bench.suites import listing

    known = {Listing.tasks: listing.tasks, Listing.agents: listing.agents}
    header, *rows = known[what]() if what in known else listing.suites(_benchmarks(file))
    _print_table(header, [[escape(printable(text)) for text in row] for row in rows])


@app.command()
def run(
    suite: SuiteArgument,
    agents: Annotated[Names, Option(help="Only these (a,b,...); module:Class adds yours.")] = None,
    tasks: Annotated[Names, Option(help="Only these tasks (a,b,...).")] = None,
    seeds: Annotated[int | None, Option(min=1, help="Per agent [default: the suite's].")] = None,
    jobs: JobsOption = 1,
    workers: Annotated[int, Option(min=1, help="Processes for one run's environments.")] = 1,
    results: ResultsOption = Path("results"),
    file: FileOption = None,
) -> None:
    """Run a suite.

    Finished runs are not run again; runs that were interrupted resume from their last checkpoint.
    """
    from scpo_bench.suites.cells import cells, get_suite

    chosen = get_suite(_benchmarks(file), suite)
    _run(cells(chosen, _names(agents), _names(tasks), seeds), suite, results, jobs, workers)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    from scpo_bench.processes import sigterm_interrupts

    sigterm_interrupts()
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing is lost, run the same command again to resume")
        raise typer.Exit(130) from None


def _run(todo: list[Cell], suite: str, results: Path, jobs: int, workers: int = 1) -> None:
    from scpo_bench.runs.launch import run_cells
    from scpo_bench.suites.cells import changed_agents
    from scpo_bench.suites.registry import load_agent

    console = _console()
    for line in changed_agents(todo, suite, results):
        typer.echo(line)
    for name in dict.fromkeys(cell.agent for cell in todo if ":" in cell.agent):
        load_agent(name)  # a mistyped module:Class is one error now, not one per run
    with _resumable():
        outcome = run_cells(todo, suite, results, jobs, console, workers)
    counts = f"{outcome.finished} run, {outcome.skipped} already there"
    summary = f"{counts}, {len(outcome.failed)} failed; records in {results / suite}"
    console.print(summary, highlight=False, markup=False)
    if outcome.failed:
        raise typer.Exit(2 if all(failure.users_mistake for failure in outcome.failed) else 1)


@app.command()
def tune(
    suite: SuiteArgument,
    trials: Annotated[int, Option(min=1, help="Configurations tried per agent and task.")] = 20,
    agents: Annotated[Names, Option(help="Only these (a,b,...).")] = None,
    tasks: Annotated[Names, Option(help="Only these tasks (a,b,...).")] = None,
    seeds: Annotated[int, Option(min=1, help="Runs per configuration, with seeds 100, ...")] = 2,
    steps: Annotated[int | None, Option(min=1, help="Per run [default: the suite's].")] = None,
    jobs: JobsOption = 1,
    output: Annotated[Path, Option("--output", "-o", help="Folder of trials and studies.")] = Path(
        "tuning"
    ),
    file: FileOption = None,
) -> None:
    """Search for the configuration of each agent of a suite, with equal effort.

    On tuning seeds and starts that no table uses. Prints what to put into the suites file, and
    writes a study per agent and task (tuning.json). The same command resumes.
    """
    from scpo_bench.runs import tune as tuning
    from scpo_bench.suites.cells import cells, get_suite

    chosen = cells(get_suite(_benchmarks(file), suite), _names(agents), _names(tasks), seeds=1)
    with _resumable():
        tuning.tune_all(chosen, output / suite, trials, seeds, steps, jobs, _console())


@app.command()
def compare(
    agents: Annotated[list[str], Argument(help="Agents, by name or module:Class.")],
    task: Annotated[str, Option(help="Gymnasium id.")],
    seeds: Annotated[int, Option(min=1)] = 3,
    steps: Annotated[int | None, Option(min=1, help="[default: a suite's, or 100000]")] = None,
    jobs: JobsOption = 1,
    results: ResultsOption = Path("results"),
    cost_limit: Annotated[float | None, Option(min=0, help="[default: the task's]")] = None,
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
def show(
    run: Annotated[Path, Argument(help="A run's folder: results/SUITE/TASK/AGENT/seed-N.")],
    update: Annotated[int | None, Option(help="One update; 0 is the start policy.")] = None,
) -> None:
    """Show the record of a run.

    With --update, what was collected and evaluated, and whether the policy violates its limit.
    """
    from scpo_bench.records.show import show

    typer.echo(show(run, update))


@app.command()
def leaderboard(
    suite: Annotated[str | None, Argument(help="Only this suite.")] = None,
    results: ResultsOption = Path("results"),
    format: Annotated[TableFormat, Option(help="Output format.")] = TableFormat.table,
    file: FileOption = None,
) -> None:
    """Print the table of all records: feasibility first, then return."""
    from scpo_bench.leaderboard import render, tables
    from scpo_bench.records.plain_files import check_folder

    benchmarks = _benchmarks(file)
    folders = results.iterdir() if results.is_dir() else ()
    found = sorted(p.name for p in folders if p.is_dir() and not p.name.startswith("."))
    names = [name for name in found if suite in (None, name)]
    for name in names:
        check_folder(results / name)
    if format is TableFormat.html and not (suite and names):
        raise UserError("--format html: needs the name of one suite that has records")
    if not names:
        hint = f"; `scpo-bench run {suite or 'SUITE'} --results {results}` creates some"
        if suite and suite not in benchmarks.suites:
            hint = nearest(suite, found)
        raise UserError(f"no records{f' of suite {suite!r}' if suite else ''} in '{results}'{hint}")
    for name in names:
        planned = _planned(benchmarks, name)
        if format is TableFormat.html:
            from scpo_bench.leaderboard.page import render_page

            typer.echo(render_page(results, name, planned))
            continue
        table = tables.leaderboard(tables.load(results, name, planned))
        if format is TableFormat.table:
            render.print_table(table, _console(), title=name)
        else:
            typer.echo(render.render(table, format.value, title=name))


@app.command()
def plot(
    suite: SuiteArgument,
    results: ResultsOption = Path("results"),
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder [default: RESULTS/SUITE/plots].")
    ] = None,
    format: Annotated[str, Option(help="png, svg or pdf (comma-separated).")] = "png",
    file: FileOption = None,
) -> None:
    """Plot a suite: values per update, SCPO's certificate, and the performance profile."""
    from scpo_bench.leaderboard import plots
    from scpo_bench.records.plain_files import check_writable, make_folder

    formats = tuple(format.split(","))
    for name in formats:
        if name not in ("png", "svg", "pdf"):
            raise UserError(f"--format: expected png, svg or pdf, got '{name}'")
    folder = _suite_folder(results, suite)
    planned = _planned(_benchmarks(file), suite)
    if output is None:
        output = folder / "plots"
        make_folder(results, output)
    check_writable("--output", output)
    for path in plots.plot_suite(results, suite, output, formats, planned):
        typer.echo(path)


@app.command()
def verify(
    folder: Annotated[Path, Argument(help="A results folder, a run folder or a .tar.gz bundle.")],
    rerun: Annotated[bool, Option("--rerun", help="Run again, and compare.")] = False,
    sample: Annotated[int | None, Option(min=1, help="Rerun only this many, at random.")] = None,
    trust_code: TrustOption = False,
    file: FileOption = None,
) -> None:
    """Check records: schema, digests, every aggregate; with --rerun, their reproducibility.

    Exit status 1: not consistent, or a re-run differs.
    """
    from scpo_bench.submissions import verify as verification

    benchmarks = _benchmarks(file)
    report = verification.verify(folder, lambda suite: _planned(benchmarks, suite))
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)
    if not rerun:
        return
    from scpo_bench.submissions.reproduce import lines, reproduce
    from scpo_bench.submissions.tiers import Tier

    found: list[Tier] = []
    for run_folder, comparison in reproduce(folder, sample, trust_code, typer.echo):
        typer.echo("\n".join(lines(run_folder, comparison)))
        found.append(comparison.tier)
    differing = found.count(Tier.DIFFERENT)
    worst = max(found, key=list(Tier).index)
    typer.echo(f"tier: {f'consistent ({differing} runs differ)' if differing else worst}")
    if differing:
        raise typer.Exit(1)


@app.command()
def bundle(
    suite: SuiteArgument,
    output: Annotated[
        Path | None, Option("--output", "-o", help=".tar.gz or folder [default: SUITE.tar.gz].")
    ] = None,
    results: ResultsOption = Path("results"),
    file: FileOption = None,
) -> None:
    """Pack a suite's records for submission: no code, no pickles."""
    from scpo_bench.submissions import bundle as packing

    _suite_folder(results, suite)
    planned = _planned(_benchmarks(file), suite) or []
    typer.echo(packing.bundle(results, suite, output or Path(f"{suite}.tar.gz"), planned))


@app.command()
def publish(
    bundle: Annotated[Path, Argument(help="A .tar.gz or a folder, as `bundle` packs it.")],
    results: ResultsOption = Path("results"),
    file: FileOption = None,
) -> None:
    """Check a bundle and add its records to the results, or say why not.

    Exit status 1: not consistent, or not what the suite plans; nothing was added.
    """
    from scpo_bench.submissions import publish as publication

    with _resumable():
        outcome = publication.publish(bundle, results, _benchmarks(file))
    typer.echo("\n".join(publication.lines(outcome)))
    if not outcome.ok:
        raise typer.Exit(1)


@app.command()
def check(
    agent: Annotated[str, Argument(help="module:Class, path/file.py:Class or a registered name.")],
    config: Annotated[str, Option(help='Its configuration, as JSON: {"n_steps": 100}.')] = "{}",
    steps: Annotated[int, Option(min=100, help="Interaction steps, at most.")] = 100_000,
) -> None:
    """Test an agent: spaces, step budget, learning, determinism, resuming, saving and loading."""
    from scpo_bench.checks.conformance import check_and_print
    from scpo_bench.configuration import json_object

    if check_and_print(agent, json_object("--config", config), steps):
        raise typer.Exit(1)


@app.command()
def falsify(
    task: Annotated[
        str, Option(help="known-smoothness, or a labelled task of pure-function dynamics.")
    ] = "known-smoothness",
    seeds: Annotated[int, Option(min=1)] = 3,
    updates: Annotated[int, Option(min=1, help="Updates examined per seed.")] = 40,
    output: Annotated[Path, Option(help="Folder for figure and counterexample.")] = Path("falsify"),
    replay: Annotated[Path | None, Option(help="Only repeat this counterexample file.")] = None,
) -> None:
    """Search for certified SCPO updates that exceed their bound.

    Exit status 1: the guarantee is falsified.
    """
    from rich.progress import Progress

    from scpo_bench.checks import counterexample
    from scpo_bench.checks import falsify as search
    from scpo_bench.checks.falsify_figure import draw
    from scpo_bench.records.files import file_name
    from scpo_bench.records.plain_files import check_writable

    if replay is not None:
        lines, breached = search.replay_lines(counterexample.load(replay))
        typer.echo("\n".join(lines))
        raise typer.Exit(0 if breached else 1)
    check_writable("--output", output)
    with Progress(transient=True, disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task("")

        def progress(what: str, done: int, of: int) -> None:
            bar.update(line, description=what, completed=done, total=of)

        report = search.falsify(task, seeds, updates, progress)
    stem = str(output / file_name(task))
    draw(report, Path(f"{stem}.png"))
    typer.echo(f"figure: {stem}.png")
    if report.counterexample is not None:
        counterexample.save(report.counterexample, Path(f"{stem}.json"))
        typer.echo(f"counterexample: {stem}.json, which --replay repeats")
    typer.echo("\n".join(search.report_lines(report)))
    if report.falsified:
        raise typer.Exit(1)


@app.command()
def prove(
    run: Annotated[Path, Argument(help="A run's folder: results/SUITE/TASK/AGENT/seed-N.")],
    trust_code: TrustOption = False,
) -> None:
    """Prove every policy of a run safe from every start state, or find one that is not.

    Repeats the run and writes proof.json into its folder. Exit status 1: not all are proved.
    """
    from rich.progress import Progress

    from scpo_bench.records.files import read_run
    from scpo_bench.records.proof import proof_lines, write_proof
    from scpo_bench.runs.prove import prove_run
    from scpo_bench.runs.trust import check_trust

    check_trust([read_run(run).cell], trust_code, typer.echo)
    with Progress(transient=True, disable=not sys.stderr.isatty()) as bar:
        proof = prove_run(run, bar)
    write_proof(run, proof)
    typer.echo(f"{run}: " + "\n".join(proof_lines(proof)))
    raise typer.Exit(int(proof.proved < proof.distinct))


@app.command()
def doctor() -> None:
    """Versions, what is missing, and how to get it."""
    from scpo_bench.runs.provenance import describe_environment

    rows = describe_environment()
    colours = [f"[yellow]{hint}[/yellow]" if hint else "[green]ok[/green]" for *_, hint in rows]
    _print_table(("", "", ""), [(*row[:2], last) for row, last in zip(rows, colours)])
    if any(hint for _, _, hint in rows):
        raise typer.Exit(1)


def _end(message: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):
        typer.echo(f"scpo-bench: {message}", err=True)
    sys.exit(status)


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and exit status 2.

    So is what the operating system refuses.
    """
    open_streams()
    try:
        app()
    except UserError as error:
        _end(str(error), error.exit_status)
    except OSError as error:
        _end(describe(error), 2)


if __name__ == "__main__":
    main()
