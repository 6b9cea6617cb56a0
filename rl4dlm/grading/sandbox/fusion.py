"""Programs run by a service that speaks SandboxFusion's protocol (github.com/bytedance/SandboxFusion).

Owns the requests: `POST URL/run_code` with `code`, `language`, `stdin` and `run_timeout`, answered by `status`
(Success, Failed or SandboxError) and `run_result` (`status`: Finished, Error or TimeLimitExceeded; `return_code`,
`stdout`).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from rl4dlm.grading.sandbox.limits import Limits
from rl4dlm.grading.sandbox.programs import Program, Result
from rl4dlm.grading.sandbox.services import Answer, LostError, Script, as_text, run_all

_TRIES = 3
_PAUSE = 0.2  # seconds before the second try, twice as long before the third
_GRACE = 10.0  # seconds that a service has beyond the program's, to start it and to answer
_LONGEST_ANSWER = 1 << 26


class Fusion:
    """A service at an address.

    Args:
        url: such as `http://localhost:8080`, with or without `/run_code` behind it.
        workers: requests at once.

    Raises:
        ValueError: no address, or one that is not of http or https.
    """

    def __init__(self, url: str, workers: int) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(
                f"sandbox_url={url!r}; sandbox_backend='fusion' needs the address of the service, "
                "such as http://localhost:8080"
            )
        self.url = url.rstrip("/").removesuffix("/run_code") + "/run_code"
        self.workers = workers

    def check(self) -> None:
        """As `Backend.check`: runs a script of one line."""
        try:
            answer = self.send(Script("print(6 * 7)", None, ""), Limits())
        except LostError as error:
            raise RuntimeError(f"no programs can be run: {error}") from error
        if not answer.finished or answer.stdout.strip() != "42":
            raise RuntimeError(f"no programs can be run: {self.url} answers, but print(6 * 7) gave {answer}")

    def run_programs(self, programs: Sequence[Program], *, limits: Limits, budget: float) -> list[list[Result]]:
        """As `Backend.run_programs`."""
        return run_all(programs, self.send, workers=self.workers, limits=limits, budget=budget)

    def send(self, sent: Script, limits: Limits) -> Answer:
        """Has one script run.

        Raises:
            LostError: no answer in time, or one that tells nothing of the program.
        """
        request = {
            "code": sent.source,
            "language": "python",
            "run_timeout": limits.seconds,
            "memory_limit_MB": max(1, limits.memory_bytes >> 20),
        }
        if sent.stdin is not None:
            request["stdin"] = sent.stdin
        said = self._post(json.dumps(request).encode(), limits.seconds + _GRACE)
        run = said.get("run_result")
        if said.get("status") not in ("Success", "Failed") or not isinstance(run, dict):
            raise LostError(f"{self.url} could not run it: {as_text(said.get('message'))[:500]}")
        if run.get("status") not in ("Finished", "TimeLimitExceeded"):
            raise LostError(f"{self.url} could not run it: {as_text(run.get('stderr'))[:500]}")
        status = run.get("return_code")
        return Answer(
            finished=run["status"] == "Finished",
            exit_status=status if isinstance(status, int) else 1,
            stdout=as_text(run.get("stdout")),
            stderr=as_text(run.get("stderr")),
        )

    def _post(self, body: bytes, timeout: float) -> dict[str, Any]:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        reason = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE * attempt)
            try:
                with urllib.request.urlopen(request, timeout=timeout) as reply:
                    text = reply.read(_LONGEST_ANSWER)
                said = json.loads(text)
                if not isinstance(said, dict):
                    raise ValueError("no object")
                return said
            except TimeoutError:  # it may be running; to ask again would be one more of what it has too much of
                raise LostError(f"{self.url} did not answer in {timeout:g} seconds") from None
            except urllib.error.HTTPError as error:
                reason = f"answered {error.code}"
                if error.code not in (429, 500, 502, 503, 504):
                    break
            except urllib.error.URLError as error:
                if isinstance(error.reason, TimeoutError):
                    raise LostError(f"{self.url} did not answer in {timeout:g} seconds") from None
                reason = f"cannot be reached: {error.reason}"
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = f"gave no proper answer: {type(error).__name__}: {error}"
        raise LostError(f"{self.url} {reason}")
