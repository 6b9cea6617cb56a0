"""Who decodes the rollouts of a training run: the engine in its process, or a server on another machine.

`backend.py` says what such a thing is, `in_process.py` is the engine, `http.py` asks a server of this library, in the
form of `wire.py` and with weights as in `weights.py`; `engines.py` asks servers of other libraries.
"""
