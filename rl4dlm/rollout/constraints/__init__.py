"""What may be written where: automata, schemas, and readers of schemas."""

from __future__ import annotations
