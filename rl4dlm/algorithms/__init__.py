"""One file per algorithm: its settings and its trainer, only what makes it different; the rest is `rl4dlm.training`."""
