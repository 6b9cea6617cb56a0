"""What every algorithm shares, and nothing of any one of them: the loop, its settings, scores, losses and checks."""

from __future__ import annotations
