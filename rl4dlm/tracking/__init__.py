"""Watching a model denoise: replays of recorded rollouts, as a page and in the terminal."""
