"""The guard: SCPO's projection as a component.

It takes a proposed change of parameters and decides what may be deployed. It knows no policy,
environment or optimiser: parameters are vectors w, constraints are something that can be evaluated
(:mod:`scpo_bench.scpo.constraints`). The SCPO agent, the wrapped SB3 algorithms and the wrapped
torch optimisers all use it.

One update, as in the paper (lines of its algorithm as known from the first author's page; with the
defaults of :class:`GuardConfig` it is that algorithm):

1. raw step Delta = -eta grad L, scaled down to the trust region;
2. bank D = [raw step, previous accepted step], the raw step alone if they are nearly collinear;
3. samples G_i = g(theta + d_i), with g(theta) from the last update;
4. projection of Delta onto the certified region (Eq. 29), a convex QCQP;
5. Armijo backtracking on the task loss, c1 = 1e-4;
6. re-check: the constraints at the new parameters; if they fail, tighten and go to 4;
7. deploy.

What this project adds, each an option: orthonormal and complete banks (``probe_radius``,
``directions``), a memory of normals, sampled and adapted L, pointwise constraints, probes that
serve several updates (``reuse``), and ``certified`` mode, which leaves out line 6.
Source: Cao, Borrelli, Joa, arXiv 2512.13788.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.errors import UserError
from scpo_bench.scpo import recovery
from scpo_bench.scpo.bank import Bank, DirectionMemory, candidate_bank, orthonormal_bank
from scpo_bench.scpo.certified_step import Held, Objective, Search, Step
from scpo_bench.scpo.constraints import Constraints, by_name, describe_worst
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.local_model import LocalModel, probe
from scpo_bench.scpo.smoothness import Smoothness

OLDEST = 10  # updates that probes serve at most
# The trust region that follows steps: at least GROW_TRUST times the last step; SHRINK_TRUST per
# update that was held, down to SMALLEST_TRUST times the configured one.
GROW_TRUST, SHRINK_TRUST, SMALLEST_TRUST = 2.0, 0.25, 1e-3
DESCENDING = 256  # constraints at most that a step of the recovery phase is computed with
PROBE_RADIUS = 1e-3  # of the recovery phase, where the paper's bank has none


class UnsafeStartError(UserError):
    """The start policy violates a constraint: SCPO's induction has nothing to start from."""


@dataclass(frozen=True)
class Decision:
    """What an update deploys.

    w: [d]. status: "unaltered" (the whole proposal), "projected", "held" (w as it was: no step was
    deployed), "recovered" (w had become unsafe; this is the newest of the earlier policies that is
    still found safe), or "recovering" (the start policy is unsafe, and so may this be).
    diagnostics: the numbers of this update.
    """

    w: Floats
    status: Literal["unaltered", "projected", "held", "recovered", "recovering"]
    diagnostics: dict[str, float]


class Guard:
    """SCPO's updates, and what it remembers between them. w = 0 is the start policy."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.g: Floats | None = None  # [K], at the deployed policy
        self.smoothness: Smoothness | None = None
        self.memory: DirectionMemory | None = None
        self.updates = 0
        # Certified steps after which some g_i was above gbar_i; of these, where it was also above
        # what the step was certified to keep to.
        self.exceeded = self.breaches = 0
        self.held = dict.fromkeys(get_args(Held), 0)  # updates that stayed, by reason
        self.recoveries = 0  # updates that returned to an earlier policy
        self.learned_margin = 0.0  # beside the configured one; grows with recoveries
        self.recovery_radius = recovery.FIRST_RADIUS  # of the next step from an unsafe start
        self.verified: list[recovery.Verified] = []  # policies to return to, the newest last
        self._model: LocalModel | None = None  # which the next update may use again
        self._age = 0  # updates that it has served
        self._idle = 0  # updates held since the last step
        self._stayed_for: Held = "converged"  # why the last one was
        self._last_length = np.inf  # of the last step; halved for each update without one
        self._trust = config.trust_radius

    def start(self, w: Floats, constraints: Constraints) -> Floats:
        """Evaluate the policy that training starts from, once. Returns g [K] at the present policy.

        Raises :class:`UnsafeStartError` if it violates a constraint, unless ``config.recovery``;
        UserError if a constraint has no value (NaN).
        """
        if self.g is None:
            self.g = _known(constraints.begin_update(0, w, None), constraints)
        if (self.g > 0).any() and not self.verified and not self.config.recovery:
            raise UnsafeStartError(
                f"SCPO: the start policy is unsafe: {describe_worst(constraints, self.g)}; "
                "start from a safe policy, or set recovery to make it safe first"
            )
        return self.g

    def update(
        self,
        w: Floats,
        propose: Callable[[], Floats],
        constraints: Constraints,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats] = (),
        objective: Objective | None = None,
    ) -> Decision:
        """One update of the deployed policy w [d].

        propose: returns the proposed change of w [d], the raw step; it is not called to return from
        an unsafe w to an earlier policy. cost_gradients: the candidates "cost". objective: without
        one, steps are not backtracked. Raises what :meth:`start` does.
        """
        g = self.start(w, constraints)
        self.updates += 1
        self.learned_margin *= recovery.DECAY
        g = _known(constraints.begin_update(self.updates, w, g), constraints)
        if len(constraints.changed):
            self._forget(constraints.changed, g)
        if (g <= 0).all():
            self.verified = recovery.pushed(self.verified, recovery.Verified(w, g))
            return self._project(w, g, propose(), constraints, rng, cost_gradients, objective)
        if self.verified:
            return self._recover(w, constraints)
        return self._leave_unsafe_start(w, g, propose(), constraints, rng, cost_gradients)

    def _forget(self, changed: NDArray[np.intp], g: Floats) -> None:
        """What was learned of constraints that others have replaced."""
        if self.smoothness is not None:
            self.smoothness.forget(changed)
        if self._model is not None:
            self._model = self._model.without(changed, g)

    def _recover(self, failed: Floats, constraints: Constraints) -> Decision:
        """Back to an earlier policy: from an unsafe one nothing can be certified."""
        again = constraints.noisy or len(constraints.changed) > 0
        self.verified = recovery.fall_back(
            self.verified, failed, lambda old: constraints.evaluate(old.w) if again else old.g
        )
        self.recoveries += 1
        self._model = None
        if constraints.noisy:
            self.learned_margin = recovery.margin_after_return(self.learned_margin)
        w, self.g = self.verified[-1].w, self.verified[-1].g
        diagnostics = {"recoveries": float(self.recoveries), "step_norm": 0.0}
        return Decision(w, "recovered", diagnostics)

    def _leave_unsafe_start(
        self,
        w: Floats,
        g: Floats,
        proposal: Floats,
        constraints: Constraints,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats],
    ) -> Decision:
        """One update of the recovery phase. The proposal is a direction among others."""
        config = self.config
        self.memory = self.memory or DirectionMemory.empty(len(constraints.names), len(w))
        others = self.memory.candidates(w, config.candidates, cost_gradients)
        radius = config.probe_radius or PROBE_RADIUS
        bank = orthonormal_bank(proposal, others, max(config.directions, 8), radius, rng)
        model = probe(constraints, w, g, constraints.nearest(g), bank, central=True)
        worst = np.argsort(-g[model.rows], kind="stable")[:DESCENDING]
        step = recovery.descend(
            g,
            model.rows[worst],
            model.slopes[worst],
            lambda z: _known(constraints.evaluate(w + bank.step(z)), constraints),
            radius=min(self.recovery_radius, config.trust_radius),
            margin=config.margin,
            retries=config.retries,
        )
        change = bank.step(step.z)
        self.g, self.recovery_radius = step.g, step.radius
        self.memory = self.memory.with_normals(bank, _steepest(model, constraints)).with_step(
            change
        )
        diagnostics = {
            "recovering": 1.0,
            "target_violation": step.target,
            "step_norm": float(np.linalg.norm(change)),
        }
        for name, value in zip(constraints.names, by_name(constraints, step.g, np.arange(len(g)))):
            diagnostics[f"realised/{name}"] = float(value)
        return Decision(w + change, "recovering", diagnostics)

    def _project(
        self,
        w: Floats,
        g: Floats,
        proposal: Floats,
        constraints: Constraints,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats],
        objective: Objective | None,
    ) -> Decision:
        """The certified step closest to ``proposal`` [d] among the combinations of a bank."""
        config = self.config
        if self.memory is None or self.smoothness is None:
            self.memory = DirectionMemory.empty(len(constraints.names), len(w))
            self.smoothness = Smoothness(
                config.smoothness, config.L, config.safety_factor, config.largest_L, len(g)
            )
        length = float(np.linalg.norm(proposal))
        raw = proposal * min(1.0, self._trust / max(length, 1e-300))
        search = Search(config, constraints, self.smoothness, self.learned_margin, objective)
        taken: Step | Held = self._stayed_for if length > 0 else "converged"
        if length > 0 and not self._waits():
            taken = self._search(search, w, g, raw, rng, cost_gradients)
        self.exceeded += search.exceeded
        self.breaches += search.breaches
        self.smoothness.carry(relax=not search.exceeded)
        if isinstance(taken, Step):
            self._took(taken, search.model)
        else:
            self._stayed(taken, g, search.model)
        if search.exceeded:
            self._model = None  # the policy may lie outside of what it certifies now
        diagnostics = {
            "proposal_norm": length,
            **self._diagnostics(taken, g, search.model, constraints),
        }
        if not isinstance(taken, Step):
            return Decision(w, "held", diagnostics)
        whole = np.array_equal(taken.change, proposal)
        return Decision(w + taken.change, "unaltered" if whole else "projected", diagnostics)

    def _waits(self) -> bool:
        """Whether to hold this update like those before it, without trying again.

        Where probes are reused to save steps, the n-th update after one that was held tries only if
        n is a power of two: the policy is the same, and the proposal nearly so.
        """
        return self.config.reuse > 0 and self._idle & (self._idle - 1) != 0

    def _search(
        self,
        search: Search,
        w: Floats,
        g: Floats,
        raw: Floats,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats],
    ) -> Step | Held:
        """By the model of earlier probes, or by a new one where that leads no further."""
        assert self.memory is not None
        if self._model is not None:
            taken = search.run(self._model, w, raw)
            if isinstance(taken, Step) or np.array_equal(self._model.w, w):
                return taken
        bank = self._bank(w, g, raw, cost_gradients, rng)
        model = search.probed(w, g, bank, search.constraints.nearest(g))
        self.memory = self.memory.with_normals(bank, _steepest(model, search.constraints))
        self._age = 0
        return search.run(model, w, raw)

    def _took(self, step: Step, model: LocalModel | None) -> None:
        """Remember a step, and the model if it is of further use."""
        config = self.config
        assert model is not None
        assert self.memory is not None
        self.g, self.memory = step.realised, self.memory.with_step(step.change)
        self._last_length, self._idle = step.reach, 0
        if config.follow_steps:
            self._trust = min(config.trust_radius, max(self._trust, GROW_TRUST * step.reach))
        self._age += 1
        spent = step.uncertainty >= config.reuse or self._age >= OLDEST
        self._model = None if spent or not model.bank.complete else model

    def _stayed(self, reason: Held, g: Floats, model: LocalModel | None) -> None:
        """Remember why the policy stays, and relax what caused it."""
        config = self.config
        self.g = g
        self.held[reason] += 1
        self._stayed_for = reason
        self._idle += 1
        self._last_length /= 2
        if config.follow_steps and reason != "converged":
            self._trust = max(SHRINK_TRUST * self._trust, SMALLEST_TRUST * config.trust_radius)
        self._age += 1
        self._model = model if config.reuse > 0 and self._age < OLDEST else None

    # ---- the bank and its probes

    def _bank(
        self,
        w: Floats,
        g: Floats,
        raw: Floats,
        cost_gradients: Sequence[Floats],
        rng: np.random.Generator,
    ) -> Bank:
        config, memory = self.config, self.memory
        assert memory is not None
        kinds, count = config.candidates, config.directions
        if config.probe_radius > 0:
            others = memory.candidates(w, kinds, cost_gradients)
            return orthonormal_bank(raw, others, count, self._radius(g, memory), rng)
        previous = memory.previous if "previous" in kinds else None
        others = memory.candidates(w, [k for k in kinds if k != "previous"], cost_gradients)
        return candidate_bank(raw, previous, others, count)

    def _radius(self, g: Floats, memory: DirectionMemory) -> float:
        """rho: as configured, or shrunk as configured.

        What the last certificate covers is the largest rho with g + |normal| rho + L rho^2 / 2 <=
        0.
        """
        rho = smallest = self.config.probe_radius
        smallest *= self.config.smallest_probe
        if self.config.follow_steps:
            rho = max(min(rho, self._last_length), smallest)
        if not self.config.safe_probes or self.smoothness is None:
            return rho
        slope = np.linalg.norm(memory.normals, axis=1)
        L = self.smoothness.known(self.config.L)
        # The positive root of L rho^2 / 2 + slope rho = -g, in the form that does not cancel.
        root = -2 * g / np.maximum(slope + np.sqrt(slope**2 - 2 * L * g), 1e-300)
        return max(min(rho, float(root.min())), smallest)

    def _diagnostics(
        self, taken: Step | Held, g: Floats, model: LocalModel | None, constraints: Constraints
    ) -> dict[str, float]:
        numbers = {
            "step_norm": float(np.linalg.norm(taken.change)) if isinstance(taken, Step) else 0.0,
            "breaches": float(self.breaches),
            "exceeded": float(self.exceeded),
            "held": float(sum(self.held.values())),
            **{f"held/{reason}": float(count) for reason, count in self.held.items()},
            "recoveries": float(self.recoveries),
            **({"learned_margin": self.learned_margin} if self.recoveries else {}),
        }
        if model is not None and self.config.safe_probes:
            numbers["probe_radius"] = float(model.bank.lengths[0])
        everything = np.arange(len(g))
        shown = {"bound": (g, everything), "realised": (g, everything)}
        if isinstance(taken, Step) and model is not None:
            shown["bound"], shown["L"] = (taken.bound, model.rows), (taken.smoothness, model.rows)
            shown["realised"] = (taken.realised, everything)
        for kind, (values, rows) in shown.items():
            for name, value in zip(constraints.names, by_name(constraints, values, rows)):
                if np.isfinite(value):
                    numbers[f"{kind}/{name}"] = float(value)
        return numbers


def _known(g: Floats, constraints: Constraints) -> Floats:
    """g [K]; UserError if it holds a NaN, which would pass for safe and be unsafe at once."""
    if np.isnan(g).any():
        name = constraints.names[constraints.group[int(np.argmax(np.isnan(g)))]]
        raise UserError(f"SCPO: constraint '{name}' has value nan; expected a number")
    return g


def _steepest(model: LocalModel, constraints: Constraints) -> Floats:
    """[n, m], the slopes of the probed constraint with the largest value under each name."""
    slopes = np.zeros((len(constraints.names), model.slopes.shape[1]))
    for name in range(len(slopes)):
        of_name = np.flatnonzero(constraints.group[model.rows] == name)
        if len(of_name):
            slopes[name] = model.slopes[of_name[np.argmax(model.values[model.rows[of_name]])]]
    return slopes
