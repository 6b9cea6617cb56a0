"""Rollouts of a server of this library, `rl4dlm serve --training-folder`, which may run on another machine.

Owns the client: HTTP without redirects and proxies, a token that no log and no setting has, weights that are written
once a version, and the refusal of an answer by others. What travels is `wire.py`'s and `weights.py`'s.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.backends.backend import BackendError, Capabilities, Policy
from rl4dlm.rollout.backends.weights import check_name, check_sendable, send
from rl4dlm.rollout.backends.wire import FORMAT, pack_request, unpack_rollout
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.state import State

TOKEN = "RL4DLM_ROLLOUT_TOKEN"
"""Environment variable, of the trainer and of the server, with what they know each other by."""

ABOUT, ROLLOUTS, WEIGHTS = "/v1/training", "/v1/training/rollouts", "/v1/training/weights"

WAITS = (0.5, 2.0, 8.0)
"""Seconds before a request is sent again that could not be delivered or that the server had no room for."""

MAX_ANSWER = 2**34
"""Bytes of an answer at most."""


def check_url(url: str) -> None:
    """Raises ValueError for a URL that is not that of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.username
        fits = fits and parts.port != 0
    except ValueError:  # no port has such a number
        fits = False
    if not fits:
        raise ValueError(f"rollout_url={url!r} is not allowed; it must be http://HOST:PORT or https://HOST:PORT")


def check_token(token: str) -> None:
    """Raises ValueError for a token that a header cannot hold, such as one with the end of a line; it is not shown."""
    if token != token.strip() or not all(" " <= letter <= "~" for letter in token):
        raise ValueError(
            f"{TOKEN} begins or ends with a space, or has an end of line or a letter beyond ASCII, which a request "
            "cannot carry; it must be printable ASCII"
        )


class Http:
    """One server.

    Args:
        url: `http://HOST:PORT` or `https://...`. timeout: seconds that a request may be without an answer.
        token: sent as a bearer token; None: there is none.

    Raises:
        ValueError: another kind of URL, or a token that no header can hold.
    """

    def __init__(self, url: str, timeout: float, token: str | None = None) -> None:
        check_url(url)
        if token is not None:
            check_token(token)
        self.url, self.timeout, self.token = url.rstrip("/"), timeout, token
        # A redirect would hand the token to another host, and machines of a cluster are not behind a proxy.
        self._opener = urllib.request.build_opener(_NoRedirects(), urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """The answer to a request, GET without a body. BackendError if there is none, or one that says what is wrong.

        What cannot be delivered is sent again, since no request changes what another one gets.
        """
        for wait in (*WAITS, None):
            request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
            if self.token is not None:
                request.add_unredirected_header("Authorization", f"Bearer {self.token}")
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    data: bytes = response.read(MAX_ANSWER)
                    if response.length:  # which a read of so many bytes does not mind
                        raise http.client.IncompleteRead(data, response.length)
                    return data
            except urllib.error.HTTPError as error:
                said = f"status {error.code}: {_sentence(error)}"
                if error.code < 500 and error.code != 429:
                    raise BackendError(f"{self.url}{path} answers with {said}") from None
                if error.code not in (429, 503) or wait is None:
                    raise self._failed(path, said) from None
            except TimeoutError:
                raise self._failed(path, f"nothing came for {self.timeout:g} s (rollout_timeout)") from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):  # of the connection; what is sent waits for an answer above
                    raise self._failed(path, f"no connection within {self.timeout:g} s (rollout_timeout)") from None
                if wait is None:
                    raise self._failed(path, str(reason) or type(reason).__name__) from None
            time.sleep(wait)
        raise AssertionError

    def ask_json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The same with JSON both ways."""
        data = self.ask(path, None if body is None else json.dumps(body).encode())
        try:
            return json.loads(data) if data.strip() else None
        except ValueError:
            raise BackendError(f"{self.url}{path} answers with something that is not JSON") from None

    def _failed(self, path: str, why: str) -> BackendError:
        return BackendError(
            f"the rollout server at {self.url} failed at {path}: {why}; start it again, and a run that was on from its "
            "newest checkpoint"
        )


class Pushed:
    """The weights that a server was handed last, and whether those of the policy are others by now.

    Args:
        run: a name of this run's own, the same on all of its processes.
        write: writes a version of the lent model, on the one process that does; None on the others.
    """

    def __init__(self, run: str, write: Callable[[Any, str], None] | None) -> None:
        if "-" in run:
            raise ValueError(f"run={run!r} is not allowed: it has a '-', which ends it in names of versions")
        self.run, self._write = check_name(run), write
        self.name: str | None = None
        self.version: int | None = None
        self._stamp: tuple[int, int] | None = None
        self._count = 0

    def update(self, policy: Policy, version: int) -> None:
        """Hands the policy over if it has changed: by its steps, or by hand since."""
        with policy() as model:
            stamp = (version, sum(parameter._version for parameter in model.parameters()))
            if stamp == self._stamp:
                return
            name = f"{self.run}-{version}-{self._count}"
            self._stamp = None  # until it has arrived
            self._count += 1
            if self._write is not None:
                self._write(model, name)
        self.name, self.version, self._stamp = name, version, stamp


class HTTPBackend:
    """Asks a server of this library for rollouts. The server's rows are those of the engine here, seed for seed.

    Args:
        url: of the server. folder: shared with it, where weights are written; the server may see it under another path.
        spec: of the policy, which the server's model must have, too.
        run: a name of this run's own, the same on all of its processes.
        writes: whether this process hands over weights. timeout: seconds, of each request. device: of rollouts.
        token: that the server was started with; None: what the environment's `RL4DLM_ROLLOUT_TOKEN` says.

    Raises:
        ValueError: a bad URL, no token or one that no header can hold, no such folder, or a server with another kind
            of model.
        BackendError: the server does not answer, or refuses the token.
    """

    def __init__(
        self,
        url: str,
        folder: str | os.PathLike[str],
        spec: DiffusionSpec,
        *,
        run: str,
        writes: bool = True,
        timeout: float = 1800.0,
        device: Any = "cpu",
        token: str | None = None,
    ) -> None:
        token = os.environ.get(TOKEN) if token is None else token
        if not token:
            raise ValueError(f"{TOKEN} is not set; it must be what the server at {url} was started with")
        if writes and not Path(folder).is_dir():
            raise ValueError(f"rollout_weights_dir={str(folder)!r} is not a folder; it is one that the server sees too")
        self.folder, self.device = Path(folder), device
        self._http = Http(url, timeout, token)
        self._pushed = Pushed(run, self._push if writes else None)
        about = self._http.ask_json(ABOUT)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise BackendError(f"{url} speaks another form than this version of rl4dlm; install the same on both sides")
        theirs = about.get("spec")
        if theirs != spec.to_dict():
            differing = [name for name, value in spec.to_dict().items() if (theirs or {}).get(name) != value]
            raise ValueError(
                f"the model at {url} is another one than the policy: {', '.join(differing)} of its spec differ"
            )
        self.dtype = str(about.get("dtype"))
        """Of the server's weights; others than the policy's move log-probabilities, see `diffusion/rollout_gap`."""
        self._schedules = tuple(map(str, about.get("schedules") or ()))

    @property
    def capabilities(self) -> Capabilities:
        """Those of the engine, with the schedules of the server's version."""
        return Capabilities(
            trace=True,
            log_probs=True,
            schedules=self._schedules,
            drafts=True,
            states=True,
            deterministic=True,
            remote=True,
        )

    def update_weights(self, policy: Policy, version: int) -> None:
        """Writes them into the folder, and waits until the server has them; nothing if it has them already."""
        self._pushed.update(policy, version)

    def _push(self, model: Any, name: str) -> None:
        check_sendable(model)
        send(model, self.folder, name)
        self._http.ask_json(WEIGHTS, {"version": name})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        *,
        row_ids: Sequence[int],
        seed: int,
        hints: Sequence[Mapping[int, int]] | None = None,
        start: State | None = None,
    ) -> Rollout:
        """See `RolloutBackend.generate`."""
        expected = self._pushed.name
        if expected is None:
            raise RuntimeError("update_weights comes before generate: the server has no weights of this run yet")
        asked = pack_request(expected, prompts, config, row_ids, seed, hints, start)
        data = self._http.ask(ROLLOUTS, asked, "application/octet-stream")
        try:
            rollout, weights = unpack_rollout(data, prompts, config, row_ids, seed, self.device)
        except ValueError as error:
            raise BackendError(f"{self._http.url}{ROLLOUTS}: {error}") from None
        if weights != expected:
            raise BackendError(
                f"{self._http.url} has decoded with weights {weights!r}, and {expected!r} are the policy's; its answer "
                "is not learnt from. Does another run use the same server?"
            )
        rollout.weight_version = self._pushed.version
        return rollout


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _sentence(error: urllib.error.HTTPError) -> str:
    """What an error's body says, as OpenAI's servers and others put it."""
    try:
        body = json.loads(error.read(2**16))
        said = body.get("error", body.get("message", body.get("detail", ""))) if isinstance(body, dict) else ""
        return " ".join(str(said.get("message", "") if isinstance(said, dict) else said).split())[:500]
    except (ValueError, OSError, http.client.HTTPException):
        return ""
