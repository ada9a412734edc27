"""The SCPO agent: safe at every update, refuses an unsafe start, resumes after loading."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import SubprocVecEnv

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.contract import ProbeMeter
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy
from scpo_bench.runs.environments import NativeVecEnv
from scpo_bench.scpo.agent import SCPO
from scpo_bench.scpo.gradient_descent import GradientDescent
from scpo_bench.scpo.guard import UnsafeStartError

IMITATION, REGRESSION = "scpo_bench/DoubleIntegratorImitation-v0", "scpo_bench/HarmfulRegression-v0"
SMALL = {"features": 16, "evaluation_starts": 32}
PER_UPDATE = 8 * 30
# The complete basis of the last layer, at a small radius: long steps, well certified.
COMPLETE = {"directions": 4096, "candidates": (), "probe_radius": 1e-3}


def make(agent_class=SCPO, task=IMITATION, seed=0, backup=True, **config):
    env = NativeVecEnv(gym.make_vec(task, num_envs=8, vectorization_mode="vector_entry_point"))
    kwargs = {"backup": AffineBackup(*env.task.backup_gain())} if backup else None
    return agent_class("MlpPolicy", env, seed=seed, policy_kwargs=kwargs, **config)


class WorstOfHeldOut(BaseCallback):
    """Largest constraint value of every deployed policy from 200 held-out starts."""

    def __init__(self, task):
        super().__init__()
        self.env = gym.make_vec(task, num_envs=200, vectorization_mode="vector_entry_point")
        self.worst = []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        observations, _ = self.env.reset(seed=77)
        worst = -np.inf
        for _ in range(self.env.unwrapped.task.horizon):
            observations, *_, info = self.env.step(
                self.model.predict(observations, deterministic=True)[0]
            )
            worst = max(worst, info["constraint_values"].max())
        self.worst.append(worst)


def test_starts_exactly_at_the_backup():
    """Safe by induction needs the first policy to be the backup, not something near it."""
    agent = make(**SMALL)
    observations = np.random.default_rng(0).uniform(-0.5, 0.5, (50, 2)).astype(np.float32)
    gain, _ = agent.env.task.backup_gain()
    assert agent.predict(observations, deterministic=True)[0] == pytest.approx(
        (observations @ gain.T).clip(-1, 1), abs=1e-6
    )


@pytest.mark.parametrize("bank", ["paper", "complete"])
@pytest.mark.parametrize("smoothness", ["adaptive", "sampled", "apriori"])
def test_every_deployed_policy_is_safe_and_the_loss_falls(smoothness, bank):
    """20 updates under every rule for L, with the paper's bank and a complete one: no violation on
    held-out starts, and a lower loss than the backup's.
    """
    config = COMPLETE if bank == "complete" else {}
    agent = make(smoothness=smoothness, L=100.0, learning_rate=0.3, **config, **SMALL)
    watch = WorstOfHeldOut(IMITATION)
    agent.learn(PER_UPDATE * 20, watch)
    assert max(watch.worst) <= 0
    assert agent.diagnostics["loss"] < 0.7
    realised = [v for k, v in agent.diagnostics.items() if k.startswith("realised/")]
    assert max(realised) <= 0


def test_unprojected_gradient_descent_violates():
    """The contrast: the same proposals without projection leave the safe set at once."""
    agent = make(GradientDescent, learning_rate=0.3, features=16)
    watch = WorstOfHeldOut(IMITATION)
    agent.learn(PER_UPDATE * 5, watch)
    assert watch.worst[0] <= 0
    assert watch.worst[-1] > 0


def test_understated_smoothness_breaches_are_recorded_and_verified_mode_stays_safe():
    """L a thousand times too small: certified mode records breaches, verified mode stays safe."""
    settings = {"smoothness": "apriori", "L": 0.01, "learning_rate": 0.45, **COMPLETE, **SMALL}
    certified = make(mode="certified", **settings)
    unsafe = WorstOfHeldOut(IMITATION)
    certified.learn(PER_UPDATE * 20, unsafe)
    assert certified.guard.breaches > 0
    assert certified.guard.recoveries > 0
    assert max(unsafe.worst) > 0
    assert unsafe.worst[-1] <= 0 or unsafe.worst[-2] <= 0  # an unsafe policy is not kept
    verified = make(mode="verified", **settings)
    watch = WorstOfHeldOut(IMITATION)
    verified.learn(PER_UPDATE * 20, watch)
    assert verified.guard.breaches > 0
    assert max(watch.worst) <= 0


@pytest.mark.parametrize("space", ["low_rank", "all"])
def test_larger_spaces_stay_safe_with_few_directions(space):
    """With 8 of hundreds of directions probed the loss still falls, and every policy is safe."""
    bank = {"directions": 8, "candidates": ("normals", "momentum"), "probe_radius": 1e-3}
    agent = make(space=space, learning_rate=0.02, **bank, **SMALL)
    watch = WorstOfHeldOut(IMITATION)
    agent.learn(PER_UPDATE * 10, watch)
    assert max(watch.worst) <= 0
    assert agent.diagnostics["loss"] < 0.85


def test_unsafe_start_is_refused_before_training():
    """A start that drifts out of bounds is refused; the error names the constraint and value."""
    agent = make(backup=False, **SMALL)
    with pytest.raises(
        UnsafeStartError, match=r"constraint '(position|velocity|terminal)' has value \d"
    ):
        agent.learn(PER_UPDATE)
    assert agent.num_timesteps == 0


def test_same_seed_same_parameters():
    """Determinism: two runs agree to the last bit."""
    weights = []
    for _ in range(2):
        agent = make(seed=3, **SMALL)
        agent.learn(PER_UPDATE * 4)
        weights.append(agent.w)
    assert (weights[0] == weights[1]).all()


@pytest.mark.parametrize(
    ("agent_class", "optimizer"), [(SCPO, "SGD"), (SCPO, "Adam"), (GradientDescent, "Adam")]
)
def test_save_and_load_restore_the_learner(tmp_path, agent_class, optimizer):
    """After loading, the next update is the same: proposal, memory, L and optimiser state."""
    extra = SMALL if agent_class is SCPO else {"features": 16}
    agent = make(agent_class, optimizer=optimizer, learning_rate=0.05, **extra)
    agent.learn(PER_UPDATE * 3)
    agent.save(tmp_path / "agent")
    loaded = agent_class.load(tmp_path / "agent", env=agent.env)
    loaded.start_training()
    agent.train()
    loaded.train()
    assert (agent.w == loaded.w).all()
    if agent_class is SCPO:
        assert (agent.guard.g == loaded.guard.g).all()


def test_works_as_any_sb3_algorithm():
    """SB3's ``evaluate_policy`` accepts it."""
    agent = make(**SMALL)
    agent.learn(PER_UPDATE)
    mean, _ = evaluate_policy(agent, agent.env, n_eval_episodes=8, warn=False)
    assert np.isfinite(mean)


def test_the_backup_is_safe_where_the_final_policy_ends():
    """Stability: held-out episodes end in the invariant set; 1000 backup steps violate nothing."""
    agent = make(learning_rate=0.3, **SMALL)
    agent.learn(PER_UPDATE * 30)
    env = gym.make_vec(IMITATION, num_envs=1000, vectorization_mode="vector_entry_point")
    task = env.unwrapped.task
    observations, _ = env.reset(seed=5)
    for _ in range(task.horizon):
        observations, *_, info = env.step(agent.predict(observations, deterministic=True)[0])
    assert info["constraint_values"][:, 2].max() <= 0
    state = tuple(info["final_obs"].astype(np.float64).T)
    gain = task.backup_gain()[0][0]
    for _ in range(1000):
        action = (gain[0] * state[0] + gain[1] * state[1],)
        following = task.next_state(state, action)
        assert max(np.max(v) for v in task.constraint_values(state, action, following, True)) <= 0
        state = following


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rat": 0.1}, "learning_rat.*did you mean 'learning_rate'"),
        (
            {"mode": "certifed"},
            "mode: expected one of certified, verified.*did you mean 'certified'",
        ),
        ({"directions": 0}, "directions: must be at least 1"),
        ({"optimizer": "Sgd"}, "optimizer: expected a class of torch.optim"),
        ({"trust_radius": float("nan")}, "trust_radius: must be above 0"),
    ],
)
def test_bad_configuration_is_named(config, message):
    """A mistyped field or value gets one line: field, expectation, nearest choice."""
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_environment_without_labels_is_refused():
    """On a task without a supervisor a supervised agent says what is missing."""
    agent = make(task="scpo_bench/DoubleIntegratorRegulation-v0", **SMALL)
    with pytest.raises(ValueError, match="gives no info\\['expert_action'\\]"):
        agent.learn(100)


def test_task_without_pure_dynamics_is_refused():
    """Constraints are evaluated in batches: the error says so before training."""
    agent = make(**SMALL)
    agent.env.task = None
    with pytest.raises(ValueError, match="offers no batched task"):
        agent.learn(100)


def test_probe_steps_are_charged_to_the_meter_of_the_environment():
    """An update on a complete basis costs its probes and the evaluation of the step, no more."""
    agent = make(mode="certified", smoothness="apriori", L=100.0, **COMPLETE, **SMALL)
    agent.env.probe_meter = meter = ProbeMeter()
    agent.learn(PER_UPDATE)
    evaluations = 1 + agent.space.dimension + 1  # the start, the probes, the step
    assert meter.steps == evaluations * 32 * 30
    assert meter.violations == 0


def test_adaptive_smoothness_costs_central_differences_once():
    """The first update samples L with probes on both sides; later ones probe one side."""
    agent = make(smoothness="adaptive", mode="certified", **COMPLETE, **SMALL)
    agent.env.probe_meter = meter = ProbeMeter()
    agent.learn(PER_UPDATE)
    first = meter.steps
    agent.learn(PER_UPDATE, reset_num_timesteps=False)
    d = agent.space.dimension
    assert first == (1 + 2 * d + 1) * 32 * 30
    assert meter.steps - first == (d + 1) * 32 * 30


def test_share_of_unsafe_iterates_under_noise_stays_below_the_level():
    """Regression, noise of 0.1 on every rollout, 20 seeds, 15 updates: at most 5 % are unsafe."""
    x = torch.linspace(-1, 1, 500, dtype=torch.float64)[None, :, None]
    bound = 0.5

    class Worst(BaseCallback):
        def __init__(self):
            super().__init__()
            self.worst = []

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            w = torch.as_tensor(self.model.w)[None]
            self.worst.append(float(self.model.space.policies(w)(x).abs().max()) / bound - 1)

    unsafe, losses = [], []
    for seed in range(20):
        agent = make(
            task=REGRESSION,
            seed=seed,
            backup=False,
            n_steps=10,
            labels="visited",
            learning_rate=0.3,
            feature_scale=4.0,
            features=16,
            evaluation_starts=64,
            constraint_noise=0.1,
            level=0.05,
            margin=0.02,
        )
        watch = Worst()
        agent.learn(80 * 15, watch)
        unsafe += [value > 0 for value in watch.worst[1:]]
        losses.append(agent.diagnostics.get("loss", 1.0))
    assert np.mean(unsafe) <= 0.05
    assert np.median(losses) < 0.4


# ---- as a Stable-Baselines3 user would

# SB3 asks for frames from environments that it makes from an id; these tasks have none.
no_frames = pytest.mark.filterwarnings("ignore:.*render_mode='rgb_array'")


def backup_of(task_id):
    return {"backup": AffineBackup(*gym.make(task_id).unwrapped.task.backup_gain())}


@no_frames
@pytest.mark.parametrize("kind", ["id", "env", "make_vec_env", "SubprocVecEnv"])
def test_environments_in_the_usual_ways(kind):
    """From an id, one environment or several in one or more processes: SCPO finds the task."""
    make = functools.partial(gym.make, f"scpo_bench:{REGRESSION}")  # imported in every process
    env = {
        "id": lambda: REGRESSION,
        "env": make,
        "make_vec_env": lambda: make_vec_env(make, 2, seed=0),
        "SubprocVecEnv": lambda: SubprocVecEnv([make, make], start_method="forkserver"),
    }[kind]()
    config = {"n_steps": 10, "labels": "visited", **SMALL}
    agent = SCPO("MlpPolicy", env, policy_kwargs=backup_of(REGRESSION), seed=0, **config)
    agent.learn(60)
    assert agent.guard.updates == 60 // (10 * agent.n_envs)
    agent.env.close()


def test_a_wrapped_task_is_not_mistaken_for_the_task():
    """A wrapper may change what is safe: the pure functions would not know of it."""
    env = gym.wrappers.TransformAction(gym.make(REGRESSION), np.negative, None)
    agent = SCPO("MlpPolicy", env, policy_kwargs=backup_of(REGRESSION), n_steps=10, **SMALL)
    with pytest.raises(UserError, match="offers no batched task"):
        agent.learn(10)


def test_the_last_update_and_episodes_are_logged(tmp_path):
    """SB3's logger gets the diagnostics and the returns that Monitor reports."""
    env = make_vec_env(functools.partial(gym.make, REGRESSION), 2, seed=0)
    agent = SCPO("MlpPolicy", env, policy_kwargs=backup_of(REGRESSION), n_steps=10, **SMALL)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(40)
    agent.logger.close()
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    assert len(rows) == 2
    logged = dict(zip(header.split(","), rows[-1].split(",")))
    assert float(logged["train/loss"]) == agent.diagnostics["loss"]
    assert float(logged["rollout/ep_len_mean"]) == 10
    assert float(logged["time/total_timesteps"]) == 40


@no_frames
def test_a_saved_policy_acts_as_before(tmp_path):
    """``policy.save`` and ``load`` keep the backup, without which the policy is another one."""
    agent = SCPO("MlpPolicy", REGRESSION, policy_kwargs=backup_of(REGRESSION), n_steps=10, **SMALL)
    agent.learn(20)
    agent.policy.save(tmp_path / "policy.zip")
    loaded = BackupActorCriticPolicy.load(tmp_path / "policy.zip")
    observations = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    actions = [policy.predict(observations, deterministic=True)[0] for policy in (agent, loaded)]
    np.testing.assert_array_equal(*actions)
    assert np.ptp(actions[0]) > 0
