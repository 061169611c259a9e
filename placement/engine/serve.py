"""Runs llama-server on one placement: started alone and isolated, asked, watched, named when it fails, ended.

What holds afterwards: the server and all it started have ended, and its log lies where the caller wanted it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.engine.failures import Failure, classify_failure, last_line
from placement.engine.find import Engine
from placement.engine.logs import PlanReading, read_run
from placement.engine.outcome import exit_words
from placement.engine.plan import program_flags
from placement.engine.rpc import free_port
from placement.engine.run import Process, kill_group, start_logged
from placement.errors import EngineFailed, EngineOutputError, EngineTimeout, InputError
from placement.inputs.model import Model

_LOCAL = "127.0.0.1"
_POLL_S = 0.05
_START_TRIES = 4  # a free port may be taken meanwhile, an RPC worker still be leaving its last client
_RETRY_PAUSE_S = 0.3
_LAST_WORDS_S = 2.0  # between a broken connection and the exit of a dying server
_QUESTION_S = 10.0
_LINE_LENGTH = 300
_QUIET = (("-lv", "4"), ("-cram", "0"), ("-ctxcp", "0"))  # full log; no prompt caches that grow host memory


class ServerFailed(EngineFailed):
    """A server died or refused; `outcome`: oom-at-start, oom-in-inference, crash, or a `Failure` kind."""

    def __init__(self, outcome: str, message: str, log: Path) -> None:
        super().__init__(message)
        self.outcome, self.log = outcome, log


class ServerHung(EngineTimeout):
    """A server did not answer in the time of a phase; `outcome` is "hang"."""

    outcome = "hang"

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, slots=True)
class Timings:
    """What the server measured of one request; `n_cached` is what it did not read again, `wall_s` is ours."""

    n_prompt: int
    prompt_ms: float
    n_generated: int
    generate_ms: float
    n_cached: int
    wall_s: float
    n_drafted: int | None = None
    n_accepted: int | None = None

    @property
    def prompt_tps(self) -> float | None:
        """Prompt tokens per second; None if there were none."""
        has_any = self.n_prompt > 0 and self.prompt_ms > 0
        return self.n_prompt / self.prompt_ms * 1e3 if has_any else None

    @property
    def generate_tps(self) -> float | None:
        """Generated tokens per second; None if there were none."""
        return (
            self.n_generated / self.generate_ms * 1e3 if self.n_generated and self.generate_ms > 0 else None
        )


class Server:
    """A running llama-server; made by `serve`."""

    def __init__(self, process: Process, port: int, alias: str, log: Path, began_s: float) -> None:
        self.process, self.port, self.alias, self.log = process, port, alias, log
        self.load_s: float | None = None  # from its start until it was ready
        self._began_s = began_s

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{_LOCAL}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id; also that of its process group."""
        return self.process.pid

    def text(self, offset: int = 0) -> str:
        """Its log from a byte offset on."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
        return ""

    def reading(self) -> PlanReading | None:
        """Read the buffers and splits of the log so far; None before it has any."""
        return read_run(self.text())

    def wait_ready(self, timeout_s: float, cancel: threading.Event | None = None) -> None:
        """Wait until the model is loaded and warmed up.

        Raises:
            ServerFailed: it ended before.
            ServerHung: it did not get there in `timeout_s`.
            EngineFailed: `cancel` was set.
        """
        import httpx

        with httpx.Client(trust_env=False, timeout=_QUESTION_S) as client:
            while time.monotonic() - self._began_s < timeout_s:
                if cancel is not None and cancel.is_set():
                    raise EngineFailed("llama-server: stopped by the user")
                if self.process.poll() is not None:
                    raise self._failed(0, "at-start")
                with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
                    models = client.get(f"{self.url}/v1/models")
                    if models.status_code == httpx.codes.OK and models.json()["data"][0]["id"] == self.alias:
                        self.load_s = time.monotonic() - self._began_s
                        return
                time.sleep(_POLL_S)
        said = f"llama-server was not ready within {timeout_s:g} s; its log is {self.log}"
        raise ServerHung(said, self.log)

    def completion(
        self,
        prompt: str | Sequence[int],
        n_predict: int,
        *,
        timeout_s: float = 600.0,
        seed: int = 1,
        options: dict[str, Any] | None = None,
    ) -> Timings:
        """Let it read a prompt (text or token ids) and write exactly `n_predict` tokens; return its timings.

        Nothing is taken from the prompt cache; sampling is greedy. `options` are added to the request.

        Raises:
            ServerFailed: it died, ran out of memory or refused.
            ServerHung: no answer within `timeout_s`.
            EngineOutputError: an answer without timings.
        """
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": n_predict,
            "cache_prompt": False,
            "ignore_eos": True,
            "temperature": 0,
            "seed": seed,
            **(options or {}),
        }
        began_s = time.monotonic()
        answer = self._post("/completion", request, timeout_s)
        return _timings(answer, time.monotonic() - began_s)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            EngineError: as `completion`.
        """
        tokens = self._post("/tokenize", {"content": text}, _QUESTION_S).get("tokens")
        if not isinstance(tokens, list):
            raise EngineOutputError("llama-server gave no tokens")
        return [int(token) for token in tokens]

    def _post(self, path: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        import httpx

        offset = self.log.stat().st_size
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _QUESTION_S))
        try:
            with httpx.Client(trust_env=False, timeout=timeout) as client:
                response = client.post(f"{self.url}{path}", json=request)
        except httpx.TimeoutException as error:
            said = f"llama-server did not answer {path} within {timeout_s:g} s; its log is {self.log}"
            raise ServerHung(said, self.log) from error
        except httpx.HTTPError as error:
            with contextlib.suppress(Exception):
                self.process.wait(_LAST_WORDS_S)
            raise self._failed(offset, "in-inference") from error
        try:
            answer = response.json()
        except ValueError as error:
            raise EngineOutputError(f"llama-server answered {path} with something unreadable") from error
        if response.status_code != httpx.codes.OK or not isinstance(answer, dict):
            raise self._failed(offset, "in-inference", refusal=_refusal(answer))
        return answer

    def _failed(self, offset: int, when: str, refusal: str | None = None) -> ServerFailed:
        """The error for what the log says from `offset` on."""
        text = self.text(offset)
        failure = classify_failure(text)
        is_dead = self.process.poll() is not None
        line = failure.line if failure is not None else refusal or last_line(text)
        how = exit_words(self.process.returncode) if is_dead else "refused"
        said = f"llama-server {how}: {line[:_LINE_LENGTH]}; its log is {self.log}"
        return ServerFailed(_outcome(failure, when, is_dead), said, self.log)


def _outcome(failure: Failure | None, when: str, is_dead: bool) -> str:
    kind = failure.kind if failure is not None else "error"
    if kind == "out-of-memory":
        return f"oom-{when}"
    if is_dead and (kind in ("abort", "error") or (when != "at-start" and kind != "gpu-error")):
        return "crash"
    return kind


def _refusal(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message", error)) if isinstance(error, dict) else str(answer)[:_LINE_LENGTH]


def _timings(answer: dict[str, Any], wall_s: float) -> Timings:
    try:
        row = answer["timings"]
        return Timings(
            n_prompt=int(row["prompt_n"]),
            prompt_ms=float(row["prompt_ms"]),
            n_generated=int(row["predicted_n"]),
            generate_ms=float(row["predicted_ms"]),
            n_cached=int(row.get("cache_n", 0)),
            wall_s=wall_s,
            n_drafted=row.get("draft_n"),
            n_accepted=row.get("draft_n_accepted"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EngineOutputError(f"llama-server's answer has no timings ({error})") from error


@contextlib.contextmanager
def serve(
    engine: Engine,
    model: Model | Path | str,
    arguments: Sequence[str],
    *,
    log: Path,
    port: int | None = None,
    start_timeout_s: float = 900.0,
    stop_grace_s: float = 10.0,
    cancel: threading.Event | None = None,
) -> Iterator[Server]:
    """Run llama-server with `arguments` while the context lasts, ready to be asked; its log goes to `log`.

    It ends with the context, and is killed when the thread that entered it ends or place itself dies.

    Raises:
        ServerFailed, ServerHung: it did not get ready.
        InputError: the model's weights are not on this disk.
        EngineMissing: the engine has no llama-server.
    """
    command = _command(engine, _weights(model), arguments)
    server = _start(command, log, port)
    try:
        for attempt in range(_START_TRIES):
            try:
                server.wait_ready(start_timeout_s, cancel)
                break
            except ServerFailed as error:
                is_passing = error.outcome == "rpc" or (error.outcome == "port-taken" and port is None)
                if not is_passing or attempt + 1 == _START_TRIES:
                    raise
                time.sleep(_RETRY_PAUSE_S)
                server = _start(command, log, port)
        yield server
    finally:
        kill_group(server.process, stop_grace_s)


def _weights(model: Model | Path | str) -> Path:
    if not isinstance(model, Model):
        path = Path(model)
    elif model.files:
        path = Path(model.files[0])
    else:
        raise InputError(model.name, "has no GGUF file here: running it needs one (--model-file)")
    if not path.is_file():
        raise InputError(path, "does not exist")
    return path


def _command(engine: Engine, path: Path, arguments: Sequence[str]) -> list[str | Path]:
    flags = program_flags(engine, "llama-server")
    quiet = [
        part for option in _QUIET if option[0] in flags and option[0] not in arguments for part in option
    ]
    return [engine.program("llama-server"), "-m", path, *flags.spell(arguments), *quiet, "--host", _LOCAL]


def _start(command: Sequence[str | Path], log: Path, port: int | None) -> Server:
    picked = port if port is not None else free_port()
    alias = f"place-{uuid.uuid4().hex[:12]}"  # another server on this port must not be taken for ours
    full = [*command, "--port", str(picked), "--alias", alias]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"$ {shlex.join(os.fspath(part) for part in full)}\n")
    began_s = time.monotonic()
    return Server(start_logged(full, log), picked, alias, log, began_s)
