"""scpo-bench: a safe-RL benchmark that shows what happens to safety at every policy update.

Importing the package registers its tasks in Gymnasium;
``gym.make("scpo_bench:scpo_bench/DoubleIntegratorImitation-v0")`` does both in one line.
"""

from scpo_bench.envs import register_tasks

__version__ = "0.1.0"

register_tasks()
