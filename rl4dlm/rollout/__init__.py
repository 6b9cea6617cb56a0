"""Prompts to rollouts: the decoding engine, its schedules, its caches and what it records. Speaks token ids only."""
