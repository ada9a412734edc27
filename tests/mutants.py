"""Mutation run: break one line at a time and count how many of the breaks a test notices.

``make mutants`` runs it. A mutant is one small change of the syntax tree: a comparison, an
operator, a constant, a condition, min and max, or a call that is dropped. Messages, annotations,
docstrings and defaults of dataclass fields are left alone: no test should pin them. Each mutant is
written into a copy of the tree, where its package's tests run until the first failure. The sample
is drawn from a fixed seed, so two runs of one commit try the same mutants.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 900  # a mutant that never ends counts as killed, as it would in the test run

# What is mutated, and the tests that ought to notice; the quick ones come first.
PACKAGES: dict[str, tuple[str, ...]] = {
    "scpo_bench/scpo": (
        "projection",
        "certificate",
        "scpo_pointwise",
        "scpo_rollouts",
        "scpo_agent",
        "scpo_wrap",
    ),
    "scpo_bench/records": ("records", "verify", "checkpoints"),
    "scpo_bench/leaderboard/metrics.py": ("leaderboard_metrics", "leaderboard_tables"),
    "baselines": (
        "baselines_maths",
        "baselines_updates",
        "baselines_networks",
        "baselines_optima",
        "baselines_agents",
    ),
}

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {"min": "max", "minimum": "maximum", "amin": "amax", "any": "all"}
NAMES |= {new: old for old, new in NAMES.items()}


@dataclass(frozen=True)
class Mutant:
    """One change: number ``change`` of number ``node`` of the file's ``mutable`` nodes."""

    path: Path
    line: int
    what: str
    node: int
    change: int

    def text(self) -> str:
        """The file with the change."""
        tree = ast.parse((ROOT / self.path).read_text())
        node = list(mutable(tree))[self.node]
        list(changes(node))[self.change][1]()
        return ast.unparse(tree)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def mutable(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and what is below it, without messages, annotations and defaults of fields."""
    yield node
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            field = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
            if isinstance(child, ast.AST) and not field:
                yield from mutable(child)


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:  # noqa: C901 - a list
    """(what changes, function that makes the change in place), for every change of one node."""

    def swap(
        owner: ast.AST, field: str, old: object, new: object
    ) -> tuple[str, Callable[[], None]]:
        names = [type(v).__name__ if isinstance(v, ast.AST) else str(v) for v in (old, new)]
        return " -> ".join(names), lambda: setattr(owner, field, new)

    op = getattr(node, "op", None)
    if type(op) in SWAPS:
        yield swap(node, "op", op, SWAPS[type(op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new = SWAPS[type(node.ops[0])]()
        what = f"{type(node.ops[0]).__name__} -> {type(new).__name__}"
        yield what, lambda: node.ops.__setitem__(0, new)  # type: ignore[call-overload]
    if isinstance(op, ast.USub):
        yield "minus dropped", lambda: setattr(node, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield swap(node, "value", node.value, not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield swap(node, "value", node.value, node.value + 1)
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        test = ast.UnaryOp(ast.Not(), copy.deepcopy(node.test))
        yield "condition negated", lambda: setattr(node, "test", test)
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield swap(node, "attr", node.attr, NAMES[node.attr])
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield swap(node, "id", node.id, NAMES[node.id])
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call dropped", lambda: setattr(node, "value", ast.Constant(None))


def mutants(package: str) -> list[Mutant]:
    """Every mutant of a folder or file, file by file."""
    target = ROOT / package
    files = sorted(target.rglob("*.py")) if target.is_dir() else [target]
    return [
        Mutant(path.relative_to(ROOT), getattr(node, "lineno", 0), what, number, change)
        for path in files
        for number, node in enumerate(mutable(ast.parse(path.read_text())))
        for change, (what, _) in enumerate(changes(node))
    ]


def run_tests(tree: Path, names: tuple[str, ...]) -> bool:
    """Whether the tests pass in a copy of the project."""
    files = [str(Path("tests", f"test_{name}.py")) for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def survives(mutant: Mutant, tests: tuple[str, ...], trees: queue.Queue[Path]) -> bool:
    """Whether no test notices the mutant, tried in one of the copies of the project."""
    tree = trees.get()
    try:
        (tree / mutant.path).write_text(mutant.text())
        return run_tests(tree, tests)
    finally:
        shutil.copyfile(ROOT / mutant.path, tree / mutant.path)
        trees.put(tree)


def main() -> None:
    """Try a sample of mutants per package; print each survivor and the share that was killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}")
    parser.add_argument("--sample", type=int, default=40, help="mutants per package [40]")
    parser.add_argument("--seed", type=int, default=0, help="of the sample [0]")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time [1]")
    arguments = parser.parse_args()
    for name in arguments.packages:
        if name not in PACKAGES:
            parser.error(f"unknown package '{name}'; choose from {', '.join(PACKAGES)}")
    chosen = arguments.packages or list(PACKAGES)

    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        trees: queue.Queue[Path] = queue.Queue()
        tracked = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        for number in range(arguments.jobs):
            tree = Path(scratch) / str(number)
            for name in filter(None, tracked):
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
            trees.put(tree)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for package in chosen:
                tests = PACKAGES[package]
                if not run_tests(Path(scratch) / "0", tests):
                    sys.exit(f"{package}: its tests fail without any mutant")
                everything = mutants(package)
                rng = np.random.default_rng(np.random.SeedSequence(arguments.seed))
                count = min(arguments.sample, len(everything))
                sample = [everything[i] for i in rng.choice(len(everything), count, replace=False)]
                bar = progress.add_task(package, total=count)
                waiting = {pool.submit(survives, mutant, tests, trees): mutant for mutant in sample}
                survivors = []
                for future in as_completed(waiting):
                    progress.advance(bar)
                    if future.result():
                        survivors.append(waiting[future])
                        progress.console.print(f"survived: {waiting[future]}", highlight=False)
                killed = count - len(survivors)
                progress.console.print(
                    f"{package}: {killed} of {count} killed ({100 * killed / count:.0f} %), "
                    f"drawn from {len(everything)}",
                    highlight=False,
                )


if __name__ == "__main__":
    main()
