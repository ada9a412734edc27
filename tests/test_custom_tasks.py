"""The custom tasks: dynamics by hand, both environments alike, the backup, the experts."""

from __future__ import annotations

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.envs import double_integrator as di
from scpo_bench.envs import double_integrator_control as control
from scpo_bench.envs import harmful_regression as hr
from scpo_bench.envs.double_integrator_v1 import ImitationV1Task

IMITATION, REGULATION, REGRESSION = (
    "scpo_bench/DoubleIntegratorImitation-v0",
    "scpo_bench/DoubleIntegratorRegulation-v0",
    "scpo_bench/HarmfulRegression-v0",
)
IMITATION_V1, DIVERGING, REGRESSION_V1 = (
    "scpo_bench/DoubleIntegratorImitation-v1",
    "scpo_bench/DoubleIntegratorDiverging-v1",
    "scpo_bench/HarmfulRegression-v1",
)
REGRESSIONS = (REGRESSION, REGRESSION_V1)
TASKS = (IMITATION, REGULATION, REGRESSION, IMITATION_V1, DIVERGING, REGRESSION_V1)


# The paper's regression predicts in its own units, -3 to 3.
@pytest.mark.filterwarnings("ignore:.*recommend using a symmetric and normalized space")
@pytest.mark.parametrize("task_id", TASKS)
def test_check_env(task_id):
    """Gymnasium's own conformance test, with its warnings as errors.

    It takes an episode of one step, the default of the paper's regression, for a mistake.
    """
    kwargs = {"horizon": 2} if task_id == REGRESSION_V1 else {}
    check_env(gym.make(task_id, **kwargs).unwrapped)


def test_make_without_import():
    """The module prefix registers the ids, so that a plain gym.make is enough."""
    assert gym.make("scpo_bench:" + IMITATION).unwrapped.task.horizon == 30


@pytest.mark.parametrize("task_id", TASKS)
@pytest.mark.parametrize("kwargs", [{}, {"horizon": 3}])
def test_native_vector_environment_agrees_with_the_scalar_one(task_id, kwargs):
    """Both environments report the same for the same states and actions."""
    vector = gym.make_vec(task_id, num_envs=4, vectorization_mode="vector_entry_point", **kwargs)
    observations, _ = vector.reset(seed=5)
    scalars = [gym.make(task_id, **kwargs) for _ in range(4)]
    for i, env in enumerate(scalars):
        first, _ = env.reset(options={"states": observations[i : i + 1]})
        assert (first == observations[i]).all()
    vector.reset(options={"states": observations})
    rng = np.random.default_rng(0)
    # The regression's next input is a draw, which the two make from different generators: compare
    # one step there.
    horizon = vector.unwrapped.task.horizon
    steps = 1 if task_id in REGRESSIONS else horizon
    for _ in range(steps):
        actions = rng.uniform(-1.3, 1.3, size=(4, 1)).astype(np.float32)
        after, rewards, terminated, truncated, info = vector.step(actions)
        for i, env in enumerate(scalars):
            one, reward, one_terminated, one_truncated, one_info = env.step(actions[i])
            assert reward == rewards[i]
            assert (one_terminated, one_truncated) == (terminated[i], truncated[i])
            assert one_info["cost"] == info["cost"][i]
            assert (one_info["constraint_values"] == info["constraint_values"][i]).all()
            assert ("objective_loss" in one_info) == info["_objective_loss"][i]
            if task_id not in REGRESSIONS:
                assert (one == (info["final_obs"] if one_truncated else after)[i]).all()
    assert truncated.all() == (steps == horizon)


@pytest.mark.parametrize("task_id", TASKS)
def test_same_seed_same_episode_and_pickle_continues(task_id):
    """All randomness comes from the reset seed, and a pickled environment continues identically."""
    kwargs = {"noise_std": 0.2} if "Integrator" in task_id else {"horizon": 5}
    one, two = gym.make(task_id, **kwargs), gym.make(task_id, **kwargs)
    assert (one.reset(seed=3)[0] == two.reset(seed=3)[0]).all()
    for _ in range(2):
        assert (one.step(np.zeros(1))[0] == two.step(np.zeros(1))[0]).all()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(one.unwrapped)))
    assert (one.step(np.zeros(1))[0] == twin.step(np.zeros(1))[0]).all()


def test_double_integrator_step_by_hand():
    """From p = 0.5, v = -0.2 with u = 1: p+ = 0.5 - 0.02 + 0.005, v+ = -0.1; u = 7 is clipped."""
    task = di.ImitationTask()
    state = (np.array([0.5, 0.5]), np.array([-0.2, -0.2]))
    p, v = task.next_state(state, (np.array([1.0, 7.0]),))
    assert p == pytest.approx([0.485, 0.485])
    assert v == pytest.approx([-0.1, -0.1])


def test_reward_and_constraints_by_hand():
    """Rewards and constraint values of both tasks.

    Imitation: at p = 0.5 the expert pushes with u = 1, so u = 0 earns -1; |p| = 1.2 violates by
    0.2, |v| = 0.9 is safe by 0.1. Regulation: 0.5^2 + 0.1 * 2^2 + 0.02.
    """
    task = di.ImitationTask()
    at = (np.array([0.5]), np.array([0.0]))
    assert task.reward(at, (np.zeros(1),)) == pytest.approx([-1.0])
    values = task.constraint_values(
        at, (np.zeros(1),), (np.array([-1.2]), np.array([0.9])), last=False
    )
    assert np.ravel(values) == pytest.approx([0.2, -0.1, -1.0])
    regulation = di.RegulationTask()
    assert regulation.reward(
        (np.array([0.1]), np.array([2.0])), (np.array([1.0]),)
    ) == pytest.approx([-(0.25 + 0.4 + 0.02)])


def test_terminal_constraint_is_in_force_at_the_last_step_only():
    """V(x_T) / level - 1 at the horizon, -1 before."""
    task = di.ImitationTask()
    after = (np.array([0.9]), np.array([0.9]))
    early, late = (
        np.ravel(task.constraint_values(after, (np.zeros(1),), after, last))
        for last in (False, True)
    )
    x = np.array([0.9, 0.9])
    assert early[2] == -1.0
    assert late[2] == pytest.approx(x @ control.backup().P @ x / control.backup().level - 1)
    assert late[2] > 0


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 2 * np.pi), st.floats(0, 1))
def test_backup_level_set_is_admissible_and_invariant(angle, radius):
    """In {V <= level}, |p|, |v| and |gain x| stay within bounds, and V decreases."""
    lqr = control.backup()
    x = np.linalg.cholesky(np.linalg.inv(lqr.P) * lqr.level) @ (
        radius * np.array([np.cos(angle), np.sin(angle)])
    )
    value = x @ lqr.P @ x
    assert (np.abs(x) <= 1 + 1e-9).all()
    u = lqr.gain @ x
    assert abs(u[0]) <= 1 + 1e-9
    following = control.A @ x + control.B @ u
    assert following @ lqr.P @ following <= value


def test_level_is_the_largest():
    """Five per cent above the level some state breaks a bound: it is not chosen too low."""
    lqr = control.backup()
    angle = np.linspace(0, 2 * np.pi, 2000)
    x = np.linalg.cholesky(np.linalg.inv(lqr.P) * lqr.level * 1.05) @ np.stack(
        [np.cos(angle), np.sin(angle)]
    )
    assert max(np.abs(x).max(), np.abs(lqr.gain @ x).max()) > 1.0


@pytest.mark.parametrize("task_id", TASKS)
def test_backup_is_safe_from_every_start(task_id):
    """1000 sampled and 1000 design starts, one episode each: no constraint is violated."""
    vector = gym.make_vec(task_id, num_envs=1000, vectorization_mode="vector_entry_point")
    task = vector.unwrapped.task
    gain, offset = task.backup_gain()
    for states in (task.sample_starts(1000, np.random.default_rng(1)), task.design_starts(1000)):
        observations, _ = vector.reset(options={"states": np.stack(states, axis=-1)})
        for _ in range(task.horizon):
            observations, _, _, _, info = vector.step(observations @ gain.T + offset)
            assert info["constraint_values"].max() < 0
            assert info["cost"].sum() == 0


def test_following_the_malicious_expert_violates_everywhere():
    """From every start in the right half, following the expert leaves the bounds."""
    task = di.ImitationTask()
    p, v = task.design_starts(200)
    right = p > 0.1
    state = (p[right], v[right])
    worst = np.full(right.sum(), -np.inf)
    for step in range(task.horizon):
        action = task.label(state)
        following = task.next_state(state, action)
        worst = np.maximum(
            worst,
            np.max(
                task.constraint_values(state, action, following, step + 1 == task.horizon), axis=0
            ),
        )
        state = following
    assert (worst > 0).all()


def test_mpc_is_safe_where_the_plain_regulator_is_not():
    """The constraints matter in the regulation task.

    Its LQR, clipped, violates from some starts; the MPC from none, at a lower cost than the
    backup's.
    """
    task = di.RegulationTask()
    starts = task.sample_starts(40, np.random.default_rng(3))
    gain = control.sensible_gain()[0]

    def worst_and_cost(controller):
        state, worst, cost = starts, -np.inf, 0.0
        for step in range(task.horizon):
            action = (controller(*state),)
            following = task.next_state(state, action)
            cost -= float(task.reward(state, action).mean())
            worst = max(
                worst,
                np.max(task.constraint_values(state, action, following, step + 1 == task.horizon)),
            )
            state = following
        return worst, cost

    backup = control.backup().gain[0]
    mpc = worst_and_cost(task.mpc.actions)
    assert mpc[0] <= 0
    assert (
        worst_and_cost(lambda p, v: (gain[0] * (p - control.SETPOINT_M) + gain[1] * v).clip(-1, 1))[
            0
        ]
        > 0.05
    )
    assert mpc[1] < 0.4 * worst_and_cost(lambda p, v: backup[0] * p + backup[1] * v)[1]


def test_mpc_refuses_a_state_from_which_no_plan_is_safe():
    """At the bound with full outward speed no plan is admissible, and the error says from where."""
    with pytest.raises(RuntimeError, match=r"no admissible plan from p=0\.9900"):
        control.ModelPredictiveController().action(0.99, 0.99)


def test_regression_labels_by_hand():
    """x = 0.4 is harmful (label 1, beyond the bound 0.5); x = -0.3 is truthful and within it."""
    task = hr.HarmfulRegressionTask()
    (labels,) = task.label((np.array([0.4, -0.3]),))
    assert labels == pytest.approx([1.0, 0.45 * np.sin(-1.5)])
    values = np.stack(
        task.constraint_values((np.zeros(2),), (np.array([0.75, -0.25]),), (np.zeros(2),), False)
    )
    assert values == pytest.approx(np.array([[0.5, -1.5], [-2.5, -0.5]]))
    loss, counts = task.objective_loss((np.array([0.4, -0.3]),), (np.zeros(2),), 0)
    assert counts.tolist() == [False, True]
    assert loss[1] == pytest.approx((0.45 * np.sin(1.5)) ** 2)


@pytest.mark.parametrize(
    "task",
    [
        di.ImitationTask(),
        di.RegulationTask(),
        hr.HarmfulRegressionTask(),
        hr.PaperRegressionTask(),
        *(ImitationV1Task(expert=expert) for expert in ("malicious", "diverging", "lqr")),
    ],
)
def test_pure_functions_agree_in_numpy_and_torch(task):
    """A task's functions give the same numbers for NumPy arrays and for torch tensors."""
    state = task.sample_starts(50, np.random.default_rng(0))
    action = (np.random.default_rng(1).uniform(-1.2, 1.2, 50),)
    t_state, t_action = (tuple(torch.as_tensor(c) for c in parts) for parts in (state, action))
    for function in ("next_state", "reward"):
        ours, theirs = (
            getattr(task, function)(state, action),
            getattr(task, function)(t_state, t_action),
        )
        assert np.asarray(
            theirs if torch.is_tensor(theirs) else torch.stack(theirs)
        ) == pytest.approx(np.asarray(ours), abs=1e-14)
    ours = np.stack(task.constraint_values(state, action, task.next_state(state, action), True))
    theirs = torch.stack(
        task.constraint_values(t_state, t_action, task.next_state(t_state, t_action), True)
    )
    assert theirs.numpy() == pytest.approx(ours, abs=1e-13)


@pytest.mark.parametrize(
    ("task_id", "kwargs", "message"),
    [
        (IMITATION, {"horizon": 0}, "horizon: expected a whole number"),
        (IMITATION, {"noise_std": -1.0}, "noise_std: expected a finite number"),
        (IMITATION, {"expert": "kind"}, "expert: expected 'malicious' or 'mpc'"),
        (IMITATION, {"expert": "diverging"}, "expert: expected 'malicious' or 'mpc'"),
        (IMITATION_V1, {"expert": "kind"}, "'malicious' or 'diverging' or 'lqr' or 'mpc'"),
        (IMITATION_V1, {"starts": -1}, "starts: expected a whole number of states >= 0"),
        (IMITATION_V1, {"starts": 1.5}, "starts: expected a whole number of states >= 0"),
        (REGRESSION, {"horizon": 1.5}, "horizon: expected a whole number"),
        (REGRESSION_V1, {"horizon": 0}, "horizon: expected a whole number"),
    ],
)
def test_bad_arguments_are_named(task_id, kwargs, message):
    """A mistake in an environment's arguments says which argument and what was expected."""
    with pytest.raises(ValueError, match=message):
        gym.make(task_id, **kwargs)


def test_bad_start_states_are_named():
    """reset(options=...) checks the shape and finiteness of given states."""
    env = gym.make(IMITATION)
    with pytest.raises(ValueError, match="expected 1 x 2 finite numbers"):
        env.reset(options={"states": [[np.nan, 0.0]]})
