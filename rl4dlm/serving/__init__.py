"""An OpenAI-compatible server around the engine, `rl4dlm serve`.

`fields.py` reads requests, `worker.py` decodes those that arrive together in one batch, `texts.py` makes text of rows,
`answers.py` makes responses of them; `app.py` and `server.py` speak HTTP, and need the extra `serve`.
"""

from __future__ import annotations
