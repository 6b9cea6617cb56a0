"""One file per algorithm: its settings and its trainer, only what makes it different. `base.py` does the rest."""
