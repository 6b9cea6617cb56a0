"""Learned unmasking policies: networks that say where a step writes. Owns them, their densities and their files.

A policy rides on the model that it was trained with (`policy.py`) and is saved in the same folder (`saving.py`); it is
in no state dictionary of the model, so that folders stay what stock classes load. How utilities become a choice is a
density's: `plackett_luce.py` has that of ordered draws. Which steps ask a policy is a schedule's business, what it
learns from a trainer's.
"""

from __future__ import annotations

from rl4dlm.rollout.policies import bernoulli as bernoulli, block_sizes as block_sizes, hidden_states as hidden_states
