"""Repeats a recorded run and proves every distinct policy that it deployed."""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from stable_baselines3.common.policies import ActorCriticPolicy
from threadpoolctl import threadpool_limits

from scpo_bench import __version__
from scpo_bench.baselines.off_policy_networks import GaussianPolicy
from scpo_bench.contract import Agent, task_of
from scpo_bench.errors import UserError
from scpo_bench.policies import ResidualHead
from scpo_bench.proofs.plants import Plant, plant_of, problem
from scpo_bench.proofs.policy import Policy, from_modules
from scpo_bench.proofs.prove import BUDGET, Verdict, prove
from scpo_bench.records.files import RecordError, read_run
from scpo_bench.records.proof import Proof, ViolatingStart
from scpo_bench.records.schema import Cell
from scpo_bench.runs.environments import make_training_env
from scpo_bench.runs.harness import Attempt


class NotRepeatedError(RecordError):
    """The repeated run is not the recorded one: what would be proved is something else."""

    exit_status = 1  # no mistake of the user's


def describe(agent: Agent) -> Policy:
    """An agent's deterministic policy as the prover knows it.

    UserError names what is not covered.
    """
    if agent.get_vec_normalize_env() is not None:
        raise UserError("proof: policies with normalised observations are not covered")
    policy: Any = getattr(agent, "policy", None)
    if isinstance(policy, GaussianPolicy) and policy.actor.backup is not None:
        return from_modules(policy.actor.trunk, policy.actor.mean, policy.actor.backup)
    if isinstance(policy, ActorCriticPolicy) and isinstance(policy.action_net, ResidualHead):
        extractor: Any = policy.mlp_extractor
        return from_modules(
            extractor.extractor.policy_net, policy.action_net.linear, extractor.backup
        )
    raise UserError(
        f"proof: policies that start at a backup are covered, got {type(policy).__name__}"
    )


def plant_of_cell(cell: Cell) -> Plant:
    """What a proof needs to know of the cell's task. UserError where it is not covered."""
    env = make_training_env(cell)
    try:
        return plant_of(task_of(env))
    finally:
        env.close()


def fingerprint(policy: Policy) -> str:
    """Equal for policies of equal weights."""
    parts = [part for layer in policy.hidden for part in layer]
    parts += [policy.head, np.array([policy.head_bias, policy.offset]), policy.gain]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


class _Prover:
    """Proves the policy of each update as the repeated run deploys it."""

    def __init__(self, plant: Plant, budget: int) -> None:
        self._plant, self._budget = plant, budget
        self.verdicts: dict[str, Verdict] = {}
        self.counterexample: ViolatingStart | None = None
        self._updates = 0

    def count(self, status: str) -> int:
        return sum(verdict.status == status for verdict in self.verdicts.values())

    def see(self, agent: Any, update: int) -> None:
        """Update 0, the start policy, is not one of the run's results."""
        if update == 0:
            return
        policy = describe(agent)
        name = fingerprint(policy)
        if name in self.verdicts:
            return
        found = prove(
            problem(self._plant, policy),
            lambda observations: agent.predict(observations, deterministic=True)[0],
            self._budget,
        )
        self.verdicts[name] = found
        if found.counterexample is not None and self.counterexample is None:
            start = found.counterexample
            self.counterexample = ViolatingStart(
                update=update,
                state=list(start.state),
                constraint=start.constraint,
                value=start.value,
            )


@threadpool_limits.wrap(limits=1)
def prove_run(folder: Path, bar: Progress | None = None, budget: int = BUDGET) -> Proof:
    """Prove every distinct policy of the finished run in ``folder``, which is repeated for it.

    Runs the code that the record names; see :func:`scpo_bench.runs.trust.check_trust`.

    UserError where the run or its task cannot be proved; NotRepeatedError if the repeated run's
    digest is not the recorded one.
    """
    run = read_run(folder)
    if run.status != "finished" or run.digest is None:
        raise RecordError(f"{folder}: the run has not finished (status '{run.status}')")
    prover = _Prover(plant_of_cell(run.cell), budget)
    began = time.perf_counter()
    seen = 0
    line = bar.add_task("", total=run.cell.steps) if bar is not None else None

    with tempfile.TemporaryDirectory() as scratch:
        attempt = Attempt(run.cell, Path(scratch) / "run", run.suite)

        def follow(steps: int, updates: int) -> None:
            nonlocal seen
            if updates > seen:
                seen = updates
                prover.see(attempt.agent, updates - 1)
            if bar is not None and line is not None:
                done = f"{prover.count('proved')}/{len(prover.verdicts)} policies proved"
                bar.update(line, description=done, completed=steps)

        attempt.execute(follow, 1)
    if attempt.record.status != "finished":
        raise RecordError(f"{folder}: the run could not be repeated: {attempt.record.error}")
    if attempt.record.digest != run.digest:
        raise NotRepeatedError(
            f"{folder}: the repeated run has another digest than the recorded one (other versions "
            "or another machine?); nothing is proved of the recorded run"
        )
    return Proof(
        key=run.key,
        digest=run.digest,
        scpo_bench=__version__,
        distinct=len(prover.verdicts),
        proved=prover.count("proved"),
        violating=prover.count("violating"),
        undecided=prover.count("undecided"),
        counterexample=prover.counterexample,
        cells=sum(v.cells for v in prover.verdicts.values()),
        seconds=round(time.perf_counter() - began, 3),
    )
