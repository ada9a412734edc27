"""scpo-bench: a safe-RL benchmark that shows what happens to safety at every policy update.

Importing the package registers its tasks in Gymnasium; ``gym.make("scpo_bench:scpo_bench/DoubleIntegratorImitation-v0")`` does
both in one line.
"""

import os.path
import sys

__version__ = "0.1.0"


def register_tasks() -> None:
    """Register every task of this package in Gymnasium. Done by importing the package; calling it again changes nothing."""
    from scpo_bench.envs import register_custom_tasks
    from scpo_bench.envs.safety_gymnasium import register_safety_gymnasium

    register_custom_tasks()
    register_safety_gymnasium()


# The command line's --help must not wait for Gymnasium: there the commands that need the tasks register them. The processes that it
# starts have its name but already multiprocessing, and register them here: gym.make finds them whatever else was imported.
if os.path.basename(sys.argv[0] if sys.argv else "") != "scpo-bench" or "multiprocessing" in sys.modules:
    register_tasks()
