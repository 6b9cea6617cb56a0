"""Grading: from the text of a completion to a number.

Owns loading reward plugins, reading answers out of completions, arithmetic that is never evaluated as code, and work
that runs in other processes under a deadline. What each task's reward is lives in rewards/, what counts as solved in
rl4dlm/tasks/.
"""

from __future__ import annotations

from rl4dlm.grading.plugins import available_rewards, load_reward, load_rewards

__all__ = ["available_rewards", "load_reward", "load_rewards"]
