"""What may change groups of completions between rewards and advantages: the seam, and inpainting."""

from __future__ import annotations
