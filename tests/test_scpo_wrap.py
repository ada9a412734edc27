"""SCPO wrapped around SB3 algorithms and torch optimisers."""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from push import Push, pushing, small_net
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from torch import nn

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.baselines.cvpo import CVPO
from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy
from scpo_bench.runs.environments import NativeVecEnv
from scpo_bench.scpo.cost_gradient import cost_gradient
from scpo_bench.scpo.guard import UnsafeStartError
from scpo_bench.scpo.spaces import PolicyWeights
from scpo_bench.scpo.wrap import Projected, ProjectedOptimizer, ProjectedPPO, projected

torch.set_num_threads(1)
REGULATION = "scpo_bench/DoubleIntegratorRegulation-v0"


def parameters(agent):
    return torch.cat([p.detach().reshape(-1) for p in agent.policy.parameters()])


class Watch(BaseCallback):
    """Calls ``measure(model)`` at every deployed policy and keeps what it returns."""

    def __init__(self, measure):
        super().__init__()
        self.measure, self.seen = measure, []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.seen.append(self.measure(self.model))


# ---- Stable-Baselines3 algorithms

ALGORITHMS = {
    "ppo": (PPO, {"n_steps": 40, "batch_size": 40, "n_epochs": 3, **small_net()}),
    "a2c": (A2C, {"n_steps": 20, **small_net()}),
    "ppo-lagrangian": (PPOLagrangian, {"steps_per_update": 80}),
    "sac": (
        SAC,
        {
            "learning_starts": 50,
            "train_freq": 50,
            "gradient_steps": 20,
            "batch_size": 32,
            **small_net(),
        },
    ),
    "cvpo": (
        CVPO,
        {
            "steps_per_update": 80,
            "updates_per_step": 0.1,
            "learning_starts": 80,
            "batch_size": 32,
            "net_arch": (8,),
            "episode_steps": 20,
        },
    ),
}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_inactive_constraints_change_nothing(name):
    """A cost that never occurs: the wrapped algorithm ends with the parameters of the plain one."""
    algorithm, config = copy.deepcopy(ALGORITHMS[name])
    plain = algorithm("MlpPolicy", pushing(threshold=9.0), seed=0, **copy.deepcopy(config))
    plain.learn(400)  # before the other is seeded: both draw from torch's global generator
    wrapped = projected(algorithm)(
        "MlpPolicy",
        pushing(threshold=9.0),
        seed=0,
        make_env=functools.partial(Push, 9.0),
        directions=2,
        rollouts=2,
        cost_limit=25.0,
        **config,
    )
    wrapped.learn(400)
    assert wrapped.guard.updates >= 4
    assert wrapped.diagnostics["step_norm"] > 0
    assert torch.equal(parameters(plain), parameters(wrapped))


@pytest.mark.parametrize("name", ["ppo", "a2c", "sac"])
def test_active_constraints_hold_for_every_deployed_policy(name):
    """At most 5 of 20 steps may cost: the plain algorithm exceeds that, the wrapped one never."""
    algorithm, config = copy.deepcopy(ALGORITHMS[name])
    config["learning_rate"] = 0.03
    observations = np.random.default_rng(5).uniform(-1, 1, (400, 2)).astype(np.float32)

    def cost(agent):
        return 20 * float((agent.predict(observations, deterministic=True)[0] > 0.5).mean())

    watch, plain = Watch(cost), Watch(cost)
    wrapped = projected(algorithm)(
        "MlpPolicy", pushing(), seed=0, make_env=Push, cost_limit=5.0, rollouts=8, **config
    )
    wrapped.learn(1600, watch)
    algorithm("MlpPolicy", pushing(), seed=0, **{**config, **small_net()}).learn(1600, plain)
    assert max(plain.seen) > 5
    assert max(watch.seen) <= 5
    assert wrapped.diagnostics["realised/cost"] <= 0


def test_target_actor_follows_a_projected_step():
    """A target left at the proposal would lead SAC-like learners back to what was refused."""

    class Targeted(SAC):
        """SAC has no target actor; this one has, as TD3 does."""

        def train(self, gradient_steps, batch_size=64):
            super().train(gradient_steps, batch_size)
            self.policy.actor_target = copy.deepcopy(self.policy.actor)

    _, config = copy.deepcopy(ALGORITHMS["sac"])
    config["learning_rate"] = 0.1
    agent = projected(Targeted)(
        "MlpPolicy", pushing(), seed=0, make_env=Push, cost_limit=5.0, rollouts=8, **config
    )
    agent.learn(400)
    assert agent.diagnostics["step_norm"] < agent.diagnostics["proposal_norm"]
    pairs = zip(agent.policy.actor.parameters(), agent.policy.actor_target.parameters())
    assert all(torch.equal(p, q) for p, q in pairs)


def test_regulation_with_ppo_proposals():
    """12 updates from the backup: no violation on held-out starts, the objective falls; PPO alone
    violates.
    """
    env = gym.make_vec(REGULATION, num_envs=200, vectorization_mode="vector_entry_point")

    def worst_and_loss(agent):
        observations, _ = env.reset(seed=77)
        worst, losses = -np.inf, []
        for _ in range(40):
            actions, _ = agent.predict(observations, deterministic=True)
            observations, *_, info = env.step(actions)
            worst = max(worst, info["constraint_values"].max())
            losses.append(info["objective_loss"].mean())
        return worst, np.mean(losses)

    def learn(algorithm, **config):
        env = NativeVecEnv(
            gym.make_vec(REGULATION, num_envs=32, vectorization_mode="vector_entry_point")
        )
        settings = {"n_steps": 40, "batch_size": 256, "gamma": 0.97, "learning_rate": 1e-3}
        kwargs = {"backup": AffineBackup(*env.task.backup_gain())}
        watch = Watch(worst_and_loss)
        agent = algorithm(
            BackupActorCriticPolicy, env, seed=0, policy_kwargs=kwargs, **settings, **config
        )
        agent.learn(1280 * 12, watch)
        return np.array(watch.seen).T

    worst, loss = learn(ProjectedPPO, directions=4, margin=0.01, evaluation_starts=256)
    plain_worst, _ = learn(PPO)
    assert worst.max() <= 0 < plain_worst.max()
    assert loss[-1] < 0.7 * loss[0]


def test_unsafe_start_is_refused_before_training():
    """From an unsafe policy nothing is certified: ``learn`` must not take a single step."""
    config = {"cost_limit": 5.0, "n_steps": 20, "batch_size": 40}
    agent = ProjectedPPO(
        "MlpPolicy", pushing(threshold=-1.0), make_env=functools.partial(Push, -1.0), **config
    )
    with pytest.raises(UnsafeStartError, match=r"constraint 'cost' has value 3"):
        agent.learn(40)
    assert agent.num_timesteps == 0


def test_recovery_makes_an_unsafe_start_safe():
    """About half of the steps cost at first, 5 of 20 may: safe soon, and kept safe from then on."""
    watch = Watch(lambda agent: (agent.guard.updates, agent.guard.g))
    agent = ProjectedPPO(
        "MlpPolicy",
        pushing(threshold=0.0),
        seed=1,
        make_env=functools.partial(Push, 0.0),
        cost_limit=5.0,
        n_steps=40,
        batch_size=40,
        recovery=True,
        **small_net(),
    )
    agent.learn(80 * 6, watch)
    values = [float(g[0]) for _, g in watch.seen]
    assert values[0] > 0
    assert max(values[2:]) <= 0
    assert len(agent.guard.verified) > 1
    assert agent.guard.verified[0].g[0] <= 0  # what it returns to was found safe


def test_user_errors_name_the_field():
    """Each mistake is refused with the field, the expectation and, where there is one, a remedy."""
    with pytest.raises(ValueError, match="margin: must be at least 0"):
        ProjectedPPO("MlpPolicy", pushing(), margin=-1)
    with pytest.raises(ValueError, match=r"candidates: expected one of.*did you mean 'normals'"):
        ProjectedPPO("MlpPolicy", pushing(), candidates=["normal"])
    with pytest.raises(ValueError, match="statistics that move"):
        ProjectedPPO("MlpPolicy", VecNormalize(pushing()), make_env=Push).learn(20)
    with pytest.raises(ValueError, match="cost_limit 0 leaves no room"):
        ProjectedPPO("MlpPolicy", pushing(), make_env=Push, cost_limit=0.0).learn(20)
    with pytest.raises(ValueError, match="has no registered id; give make_env"):
        ProjectedPPO("MlpPolicy", pushing()).learn(20)


# ---- what is evaluated is what is deployed


class Costly(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Every step costs 1."""

    def __init__(self, env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def step(self, action):
        *rest, info = self.env.step(action)
        return (*rest, {**info, "cost": 1.0})


class Unrecorded(gym.Wrapper):
    """A wrapper that no specification can create again."""


class Negated(VecEnvWrapper):
    """The environment does the opposite of what the agent wants."""

    def reset(self):
        return self.venv.reset()

    def step_async(self, actions):
        self.venv.step_async(-actions)

    def step_wait(self):
        return self.venv.step_wait()


@pytest.fixture
def push():
    """Creates Push as a registered task, which has a specification."""
    gym.register("Push-v0", Push)
    yield functools.partial(gym.make, "Push-v0")
    del gym.registry["Push-v0"]


SMALL = {"n_steps": 20, "batch_size": 20, "rollouts": 2, "rollout_budget": 4, **small_net()}


def test_rollouts_have_the_wrappers_of_the_training_environments(push):
    """A wrapper whose every step costs 1: the start policy is unsafe, and the rollouts see it."""
    env = make_vec_env(push, 2, seed=0, wrapper_class=Costly)  # behind SB3's Monitor
    with pytest.raises(UnsafeStartError, match="constraint 'cost' has value 19"):
        ProjectedPPO("MlpPolicy", env, cost_limit=1.0, **SMALL).learn(20)
    plain = make_vec_env(push, 2, seed=0)
    agent = ProjectedPPO("MlpPolicy", plain, cost_limit=1.0, seed=0, **SMALL).learn(80)
    assert agent.guard.updates >= 1


def test_wrappers_that_rollouts_would_miss_are_refused(push):
    """Silently dropped, each would let an unsafe policy be certified; ``make_env`` answers it."""
    env = make_vec_env(push, 1, wrapper_class=Unrecorded)
    with pytest.raises(UserError, match=r"wrapper Unrecorded cannot be created again.*make_env"):
        ProjectedPPO("MlpPolicy", env, **SMALL).learn(20)
    negated = Negated(make_vec_env(push, 1))
    with pytest.raises(UserError, match="do not see wrapper Negated; give make_env"):
        ProjectedPPO("MlpPolicy", negated, **SMALL).learn(20)
    ProjectedPPO("MlpPolicy", negated, make_env=Push, **SMALL).learn(20)
    frozen = VecNormalize(make_vec_env(push, 1), training=False)
    with pytest.raises(UserError, match="do not see wrapper VecNormalize"):
        ProjectedPPO("MlpPolicy", frozen, **SMALL).learn(20)
    rewards = VecNormalize(DummyVecEnv([push]), norm_obs=False)
    ProjectedPPO("MlpPolicy", VecMonitor(rewards), **SMALL).learn(20)
    regulation = gym.make_vec(REGULATION, num_envs=2, vectorization_mode="vector_entry_point")
    with pytest.raises(UserError, match="do not see wrapper Negated"):
        ProjectedPPO("MlpPolicy", Negated(NativeVecEnv(regulation)), **SMALL).learn(20)


class Normed(BaseFeaturesExtractor):
    """Batch norm: acting depends on statistics that training moves."""

    def __init__(self, space):
        super().__init__(space, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, observations):
        return self.norm(observations)


def test_policies_with_running_statistics_are_refused(push):
    """The deployed policy would act by other statistics than the one that was evaluated."""
    config = {**SMALL, "policy_kwargs": {"features_extractor_class": Normed, "net_arch": [8]}}
    agent = ProjectedPPO("MlpPolicy", make_vec_env(push, 1, seed=0), cost_limit=20.0, **config)
    before = {name: value.clone() for name, value in agent.policy.named_buffers()}
    assert len(agent.weights.start)  # finding the weights that act moves no statistics
    after = dict(agent.policy.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(UserError, match=r"norm.running_mean' has moved"):
        agent.learn(40)


def test_signed_values_are_the_constraints_where_the_limit_is_zero():
    """With limit 0 no signed value may be positive: known to the agent, held in every update."""
    agent = ProjectedPPO(
        "MlpPolicy",
        pushing(signed=True),
        make_env=functools.partial(Push, signed=True),
        cost_limit=0.0,
        seed=0,
        learning_rate=0.03,
        n_steps=40,
        batch_size=40,
        n_epochs=5,
        margin=0.05,
        **small_net(),
    )
    agent.learn(1200)
    assert agent.constraints.names == ("constraint_0",)
    assert 0 < agent.predict(np.zeros((1, 2), np.float32), deterministic=True)[0][0, 0] <= 0.5


def test_the_algorithm_is_told_the_cost_limit_if_it_knows_one():
    """One limit per cell: the wrapped learner and the guard must not aim at different ones."""
    agent = projected(PPOLagrangian)(
        "MlpPolicy", pushing(), make_env=Push, cost_limit=7.0, steps_per_update=80
    )
    assert agent.guard_config.cost_limit == agent.config.cost_limit == 7.0
    assert projected(PPOLagrangian).Config is PPOLagrangian.Config
    assert "cost_limit" in ProjectedPPO.Config.__dataclass_fields__


@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_wrapped_classes_can_be_pickled(algorithm):
    """Workers and checkpoints pickle classes; the one of the registry by its name."""
    wrapped = projected(algorithm)
    assert projected(algorithm) is wrapped
    assert wrapped.__name__ == f"Projected{algorithm.__name__}"
    copied = cloudpickle.loads(cloudpickle.dumps(wrapped))
    assert issubclass(copied, Projected)
    assert issubclass(copied, algorithm)
    assert (copied is ProjectedPPO) == (algorithm is PPO)


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_save_and_load_keep_the_guard(tmp_path, name):
    """After loading: the same weights in the same coordinates, and what the guard had learned."""
    algorithm, config = copy.deepcopy(ALGORITHMS[name])
    agent = projected(algorithm)(
        "MlpPolicy", pushing(), make_env=Push, cost_limit=5.0, seed=0, **config
    )
    agent.learn(400)
    agent.save(tmp_path / "agent")
    loaded = projected(algorithm).load(tmp_path / "agent", env=pushing())
    assert np.array_equal(loaded.weights.read(), agent.weights.read())
    assert loaded.weights.read().any()
    assert np.array_equal(loaded.guard.g, agent.guard.g)
    assert np.array_equal(loaded.guard.memory.normals, agent.guard.memory.normals)
    assert loaded._evidence.streams == agent._evidence.streams > 0
    assert len(loaded.guard.verified) == len(agent.guard.verified) > 1
    assert loaded.guard_config == agent.guard_config


def test_cost_gradient_points_at_the_cost():
    """Actions above 0.5 cost: following the gradient raises the mean action."""
    agent = PPO(
        "MlpPolicy", pushing(8), seed=0, n_steps=100, batch_size=80, policy_kwargs={"net_arch": [8]}
    )
    weights = PolicyWeights(agent.policy)
    costs = []

    class Costs(BaseCallback):
        def _on_step(self):
            costs.append([info["cost"] for info in self.locals["infos"]])
            return True

    _, callback = agent._setup_learn(800, Costs())
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, 100)
    last_starts = agent._last_episode_starts
    gradient = cost_gradient(
        agent.policy, weights, agent.rollout_buffer, np.array(costs), 0.9, last_starts
    )
    observations = np.random.default_rng(0).uniform(-1, 1, (100, 2)).astype(np.float32)
    before = agent.predict(observations, deterministic=True)[0].mean()
    weights.write(0.1 * gradient / np.linalg.norm(gradient))
    assert agent.predict(observations, deterministic=True)[0].mean() > before + 0.01


def test_examples_of_the_documentation_run():
    """The code blocks of docs/scpo_wrapping.md run as printed, and stay short."""
    text = (Path(__file__).parent.parent / "docs" / "scpo_wrapping.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert len([line for line in block.splitlines() if line]) <= 12
        exec(compile(block, "docs/scpo_wrapping.md", "exec"), {})


# ---- torch optimisers


def fit(make_optimizer, steps=60):
    """Fit y = 2 x by a line: (model, its value at 1 after every step, optimiser)."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer = make_optimizer(model)
    x = torch.linspace(-1, 1, 20)[:, None]
    at_one = []
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - 2 * x) ** 2).mean().backward()
        optimizer.step()
        at_one.append(float(model(torch.ones(1, 1)).detach()))
    return model, at_one, optimizer


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.05)


def test_projected_optimizer_stays_feasible_and_comes_close():
    """The best line with value <= 1 at x = 1 is reached to 5 %, and no step exceeds the bound."""
    _, at_one, optimizer = fit(
        lambda model: ProjectedOptimizer(
            adam(model), lambda: model(torch.ones(1, 1)).reshape(1) - 1.0, names=["ceiling"]
        )
    )
    assert max(at_one) <= 1
    assert at_one[-1] > 0.95
    assert optimizer.diagnostics["realised/ceiling"] <= 0
    _, plain, _ = fit(adam)
    assert max(plain) > 1.2


def test_projected_optimizer_changes_nothing_when_inactive():
    """Far from every bound the parameters are the optimiser's own, to the last bit."""
    one, _, _ = fit(adam)
    other, _, _ = fit(
        lambda model: ProjectedOptimizer(adam(model), lambda: model(torch.ones(1, 1)) - 1e6)
    )
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


def test_projected_optimizer_keeps_every_bit_of_what_it_does_not_project():
    """1e-20 cannot be read as a change from 1 and written back: it has to be copied."""
    parameter = nn.Parameter(torch.ones(1))
    targets = iter([1e-20, 5.0])

    class Jump(torch.optim.SGD):
        def step(self, closure=None):
            parameter.data.fill_(next(targets))

    safe_at = (0.0, 1e-20, 1.0)
    optimizer = ProjectedOptimizer(
        Jump([parameter], lr=0.1),
        lambda: [
            -1.0 if any(math.isclose(parameter.item(), s, rel_tol=1e-6) for s in safe_at) else 1.0
        ],
        smoothness="apriori",
        L=1e-3,
        trust_radius=10.0,
        probe_radius=1e3,
    )
    expected = torch.tensor([1e-20])
    optimizer.step()
    assert torch.equal(parameter, expected)
    optimizer.step()
    assert optimizer.diagnostics["held"] == 1
    assert torch.equal(parameter, expected)


@pytest.mark.parametrize("mode", ["certified", "verified"])
def test_rounding_of_float32_is_part_of_the_slope_error(mode):
    """Linear constraints, L = 1e-6: valid, and yet breached by slopes off by eps / rho.

    20 planes around the origin in float32, a target that moves through all of them: no violation in
    200 steps. With slopes taken for exact, a third of the steps violate in certified mode.
    """
    torch.manual_seed(0)
    planes = torch.nn.functional.normalize(torch.randn(20, 10), dim=1)
    w, target = nn.Parameter(torch.zeros(10)), 3 * torch.randn(10)
    optimizer = ProjectedOptimizer(
        torch.optim.SGD([w], lr=0.1), lambda: planes @ w - 1.0, mode=mode,
        smoothness="apriori", L=1e-6,
    )  # fmt: skip
    worst = []
    for step in range(200):
        optimizer.zero_grad()
        loss = (w - target * np.sin(step / 20)).square().sum()
        loss.backward()
        optimizer.step()
        worst.append((planes @ w - 1.0).max().item())
    assert max(worst) <= 0
    assert sum(value > -1e-3 for value in worst) > 50  # they are active
    assert loss.item() < 5
    assert optimizer.diagnostics["held"] < 30


def test_rounding_is_measured_only_where_there_is_some():
    """In float64 no evaluation is spent on it."""
    evaluations = {}
    for dtype in (torch.float32, torch.float64):
        w, count = nn.Parameter(torch.ones(3, dtype=dtype)), []
        optimizer = ProjectedOptimizer(
            torch.optim.SGD([w], lr=0.1), lambda w=w, n=count: n.append(1) or w[:1] - 5.0
        )
        w.grad = torch.ones_like(w)
        optimizer.step()
        evaluations[dtype] = len(count)
    assert evaluations[torch.float32] == evaluations[torch.float64] + 5


def test_projected_optimizer_refuses_an_unsafe_start():
    """The first step names the constraint, leaves the parameters alone; bad fields are named."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = ProjectedOptimizer(
        torch.optim.SGD([parameter], lr=0.1), lambda: torch.ones(1), names=["ceiling"]
    )
    parameter.grad = torch.ones(1)
    with pytest.raises(UnsafeStartError, match="constraint 'ceiling' has value 1"):
        optimizer.step()
    assert parameter.item() == 0.0
    nothing = ProjectedOptimizer(
        torch.optim.SGD([parameter], lr=0.1), lambda: torch.tensor([torch.nan]), names=["ceiling"]
    )
    with pytest.raises(UserError, match="constraint 'ceiling' has value nan"):
        nothing.step()
    with pytest.raises(ValueError, match="did you mean 'margin'"):
        ProjectedOptimizer(torch.optim.SGD([parameter], lr=0.1), lambda: torch.zeros(1), margn=1)
