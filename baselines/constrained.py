"""What the agents share beyond Stable-Baselines3: configuration, generator, costs, saving."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv

from scpo_bench.baselines.episode_costs import EpisodeCosts
from scpo_bench.baselines.normalisation import normalisation_state, restore_normalisation
from scpo_bench.configuration import resolve_config


class CostConfig(Protocol):
    """The part of every agent's configuration that this module reads."""

    @property
    def cost_keys(self) -> tuple[str, ...]:
        """Keys of ``info`` the costs are read from, one per constraint."""
        ...


class ConstrainedAlgorithm(BaseAlgorithm):
    """Goes before an SB3 algorithm; a subclass adds ``Config`` and ``_sb3_arguments``.

    config: fields of ``Config``. Raises ValueError for unknown or out-of-range fields. ``learn``
    raises KeyError for a missing cost, and FloatingPointError (naming step, environment and field)
    for a non-finite observation, reward or cost.
    """

    Config: ClassVar[type[Any]]
    config: CostConfig
    rng: np.random.Generator
    """Action noise and minibatches; ``save`` keeps its state."""
    episode_costs: EpisodeCosts
    diagnostics: dict[str, float]
    """Numbers about the last update."""
    normalisation: dict[str, Any] | None = None
    """The statistics of ``VecNormalize`` when last saved."""

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        *,
        seed: int | None = None,
        verbose: int = 0,
        device: str = "cpu",
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **config: Any,
    ) -> None:
        self.config = resolve_config(self.Config, config)
        super().__init__(
            policy,
            env,
            seed=seed,
            verbose=verbose,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            **self._sb3_arguments(device),
        )
        self.diagnostics = {}
        if _init_setup_model:
            self._setup_model()

    def _sb3_arguments(self, device: str) -> dict[str, Any]:
        """What the SB3 algorithm's constructor takes besides the arguments of this one."""
        raise NotImplementedError

    def _setup_model(self) -> None:
        """Create whatever of the training state ``load`` has not already put in place."""
        seed = self.seed
        if hasattr(self, "rng"):  # loaded: neither generator nor environments start again
            self.seed = None
        super()._setup_model()  # type: ignore[safe-super]
        self.seed = seed
        if not hasattr(self, "rng"):
            self.rng = np.random.default_rng()
        running = self.episode_costs.running_NC if hasattr(self, "episode_costs") else ()
        if len(running) != self.n_envs:
            self.episode_costs = EpisodeCosts(self.n_envs, len(self.config.cost_keys))

    def set_random_seed(self, seed: int | None = None) -> None:
        """SB3's, and the agent's own generator."""
        super().set_random_seed(seed)
        if seed is not None:
            self.rng = np.random.default_rng(seed)

    def _start_update(self, episode_starts: NDArray[np.bool_] | None) -> None:
        """Count the episodes of the coming collection separately."""
        if np.all(episode_starts):  # a reset from outside may have cut episodes short
            self.episode_costs.restart_episodes()
        self.episode_costs.start_update()

    def _publish(self, diagnostics: dict[str, float]) -> None:
        """Make this update's numbers available to the harness and the logger."""
        self.diagnostics = {name: float(value) for name, value in diagnostics.items()}
        for name, value in self.diagnostics.items():
            self.logger.record(f"train/{name}", value)

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """SB3's zip file with the whole training state.

        It also holds optimiser states, multipliers, the generator, a replay buffer if there is one,
        and ``VecNormalize`` statistics.
        """
        self.normalisation = normalisation_state(self._vec_normalize_env)
        super().save(path, *args, **kwargs)

    @classmethod
    def load(
        cls, path: Any, env: GymEnv | None = None, device: Any = "cpu", *args: Any, **kwargs: Any
    ) -> Self:
        """As SB3's; an ``env`` wrapped in ``VecNormalize`` gets the saved statistics back.

        ``force_reset=False`` keeps the last observation: for an env that is itself in the state it
        was saved in.
        """
        agent = super().load(path, env, device, *args, **kwargs)
        restore_normalisation(agent._vec_normalize_env, agent.normalisation)
        return agent


def flat(observations: Any) -> NDArray[np.float32]:
    """[N, ...] observations as float32 [N, O]."""
    return np.asarray(observations, np.float32).reshape(len(observations), -1)
