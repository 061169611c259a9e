"""One candidate in one round: plan, start, warm-up, prompts, canary, stop; and a record of each.

What holds afterwards: the server has ended, and every phase that finished is on the disk.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.engine.find import Engine, list_devices
from placement.engine.plan import EnginePlan, fit_arguments, plan
from placement.engine.rpc import endpoints_of, exclusive
from placement.engine.serve import Server, ServerFailed, serve
from placement.errors import EngineError, EngineFailed, InputError
from placement.inputs.machine import Machine
from placement.measure.records import log as records
from placement.measure.records.phase_names import CANARY, LONG, PLAN, SHORT, START, STOP, WARM_UP
from placement.measure.verify.candidates import FIT, VerifyCandidate
from placement.measure.verify.outcomes import oom_kills, outcome_of, tail
from placement.measure.verify.prompts import Asked, prompt_tokens, slot_tokens
from placement.measure.verify.watch import MemoryWatch, Sample

if TYPE_CHECKING:
    from placement.engine.find import ListedDevice
    from placement.measure.records.schema import Key, Predicted, Record, Timing

MEASURED_PHASES = (SHORT, LONG, CANARY)
MOST_REPEATS = 24
PATIENCE = 3.0  # times the seconds asked for: as long as the fastest repeats do not agree
AGREEMENT = 0.02

PhaseTimings = Mapping[str, "Sequence[Timing]"]  # of each measured phase, by repeat

_GREW = re.compile(r"compute buffer size of .* does not match expectation of .*")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a phase may take before it counts as hung."""

    plan_s: float = 120.0
    start_s: float = 900.0
    prompt_s: float = 900.0
    canary_s: float = 3600.0
    stop_s: float = 15.0


class BudgetSpent(Exception):
    """The time given is over; what is measured so far stays."""


class _Ended(Exception):
    """The visit is over: its last record says why."""


@dataclass(frozen=True)
class Bench:
    """What all visits share."""

    engine: Engine
    model_file: Path
    machine: Machine
    key: Key
    campaign: str
    asked: Asked
    limits: Limits
    ctx_tokens: int  # of one slot, where the log does not say
    folder: Path
    nvml: Any | None
    write: Callable[[Record], None]
    solved_digest: str | None = None  # of the model that was solved for, where it is laid out as the file is
    tell: Callable[[VerifyCandidate, int, str, int], None] = lambda *_: None
    on_server: Callable[[int], None] | None = None
    on_sample: Callable[[Sample], None] | None = None
    deadline_s: float | None = None  # by time.monotonic()


@dataclass
class Visit:
    """One candidate in one round."""

    bench: Bench
    candidate: VerifyCandidate
    round: int
    _watch: MemoryWatch | None = None
    _arguments: tuple[str, ...] = ()
    _log: Path | None = None
    _slot: int = 0
    _tokens: list[int] = field(default_factory=list)
    _facts: dict[str, Any] = field(default_factory=dict)

    def is_measured(self, known: PhaseTimings) -> bool:
        """Whether every measured phase was repeated often enough."""
        return all(self._is_enough(phase, known.get(phase, ())) for phase in MEASURED_PHASES)

    def _is_enough(self, phase: str, result: Sequence[Timing]) -> bool:
        asked = self.bench.asked
        if len(result) < (asked.repeats if phase == SHORT else 1):
            return False
        seconds = sum(each.prompt_s + each.generate_s for each in result)
        if len(result) >= MOST_REPEATS or seconds >= PATIENCE * asked.least_s:
            return True
        return seconds >= asked.least_s and _do_fastest_agree(phase, result)

    def run(self, known: PhaseTimings) -> None:
        """Run what was not measured yet, writing a record of each phase; a failure ends the visit, not the run.

        Raises:
            BudgetSpent: the time given was over between two phases.
        """
        self._arguments = self.candidate.arguments
        with contextlib.suppress(_Ended):
            with self._phase(PLAN):
                self._plan()
            endpoints = endpoints_of(self._arguments)
            watch = MemoryWatch(
                self.bench.machine,
                self.bench.nvml,
                self.bench.on_server,
                self.bench.on_sample,
                self.candidate.caps_mib,
            )
            with exclusive(endpoints, self.bench.limits.plan_s), watch as self._watch:
                self._serve(known)

    def _serve(self, known: PhaseTimings) -> None:
        bench = self.bench
        self._log = self._new_log()
        context = serve(
            bench.engine,
            bench.model_file,
            self._arguments,
            log=self._log,
            start_timeout_s=bench.limits.start_s,
            stop_grace_s=bench.limits.stop_s,
        )
        with contextlib.ExitStack() as stack:
            with self._phase(START):
                server = stack.enter_context(context)
                self._started(server)
            with self._phase(WARM_UP):
                self._warm_up(server)
            for phase in MEASURED_PHASES:
                results = list(known.get(phase, ()))
                while not self._is_enough(phase, results):
                    with self._phase(phase, len(results)):
                        results.append(self._ask(server, phase))
            with self._phase(STOP):
                stack.close()
                self._stopped(server)

    def _lengths(self, phase: str) -> tuple[int, int]:
        """Tokens read and written in a phase, cut to what a slot holds."""
        asked, slot = self.bench.asked, self._slot
        n_prompt, n_generate = {
            WARM_UP: (asked.short_prompt, 16),
            SHORT: (asked.short_prompt, asked.short_generate),
            LONG: (asked.long_prompt, asked.long_generate),
            CANARY: (asked.canary or slot // 4, asked.canary_generate),
        }[phase]
        n_generate = max(1, min(n_generate, slot // 4))
        return max(1, min(n_prompt, slot - n_generate - 1)), n_generate

    def _warm_up(self, server: Server) -> None:
        """Make the tokens of all prompts, and have the server read and write some."""
        self._slot = slot_tokens(server.text()) or self.bench.ctx_tokens
        longest = max(self._lengths(phase)[0] for phase in MEASURED_PHASES)
        self._tokens = prompt_tokens(server, longest, self.bench.asked.seed)
        self._ask(server, WARM_UP)

    def _ask(self, server: Server, phase: str) -> Timing:
        from placement.measure.records.schema import Timing

        limits, seed = self.bench.limits, self.bench.asked.seed
        n_prompt, n_generate = self._lengths(phase)
        limit_s = limits.canary_s if phase == CANARY else limits.prompt_s
        result = server.completion(self._tokens[:n_prompt], n_generate, timeout_s=limit_s, seed=seed)
        timing = self._facts["timing"] = Timing(
            n_prompt=result.n_prompt,
            prompt_s=round(result.prompt_ms / 1e3, 6),
            n_generated=result.n_generated,
            generate_s=round(result.generate_ms / 1e3, 6),
        )
        if result.n_generated < n_generate or result.n_cached:
            said = f"{result.n_generated} of {n_generate} tokens, {result.n_cached} taken from a cache"
            raise EngineFailed(f"llama-server measured something else than asked: {said}")
        return timing

    def _plan(self) -> None:
        bench, candidate = self.bench, self.candidate
        if bench.engine.fingerprint() != bench.key.engine_fingerprint:
            raise ServerFailed("bad-argument", "llama.cpp was built anew since this verify began", Path())
        endpoints = endpoints_of(candidate.arguments)
        with exclusive(endpoints, bench.limits.plan_s):
            devices = list_devices(bench.engine, endpoints, timeout_s=bench.limits.plan_s)
        self._refuse_missing(devices)
        self._arguments = candidate.arguments_on(devices)
        self._facts["predicted"] = candidate.predicted()
        self._facts["n_host_layers"] = candidate.n_host_layers
        if candidate.role == FIT:
            with contextlib.suppress(EngineError):  # only told, never needed
                self._facts["fit_arguments"] = fit_arguments(
                    bench.engine, bench.model_file, self._arguments, timeout_s=bench.limits.plan_s
                )
            return
        result = plan(
            bench.engine,
            bench.model_file,
            candidate.arguments,
            program="llama-server",
            timeout_s=bench.limits.plan_s,
        )
        self._facts["predicted"] = planned(candidate.predicted(), result)
        over = over_cap_words(result, candidate.caps_mib)
        self._facts["detail"] = f"planned over the cap: {over}" if over else ""

    def _refuse_missing(self, devices: tuple[ListedDevice, ...]) -> None:
        has = {device.name for device in devices}
        missing = [each.name for each in self.bench.machine.devices if each.name not in has]
        if missing and (self.candidate.role == FIT or self._needs(missing)):
            known = ", ".join(sorted(has)) or "no GPU"
            said = f"this llama.cpp has no {', '.join(missing)} (it has {known})"
            is_remote = all(name.startswith("RPC") for name in missing)
            raise ServerFailed("rpc" if is_remote else "bad-argument", said, Path())

    def _needs(self, missing: list[str]) -> bool:
        solution = self.candidate.solution
        return solution is not None and any(name in solution.assignment.devices for name in missing)

    def _started(self, server: Server) -> None:
        if server.load_s is None:
            raise ServerFailed("port-taken", "llama-server found no free port", server.log)
        result = server.reading()
        if result is not None:
            self._facts["buffers_mib"] = {
                name: round(memory.total_mib, 2) for name, memory in result.devices.items()
            }
            self._facts["splits_prompt"] = result.splits_prompt
            self._facts["splits_decode"] = result.splits_decode

    def _stopped(self, server: Server) -> None:
        grown = _GREW.search(server.text())
        notes = [f"at run time a {grown[0]}"] if grown else []
        if server.process.returncode not in (0, -signal.SIGTERM):
            notes.append(f"the server ended with {server.process.returncode} when it was stopped")
        self._facts["detail"] = "; ".join(notes)

    def _new_log(self) -> Path:
        folder = self.bench.folder / "logs"
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = re.sub(r"[^\w.-]+", "-", self.candidate.name)
        return folder / f"{stamp}-round{self.round}-{name}.log"

    @contextlib.contextmanager
    def _phase(self, phase: str, repeat: int = 0) -> Iterator[None]:
        """Time a phase and write its record.

        Raises:
            _Ended: it failed.
            BudgetSpent: there was no time left to begin it.
        """
        bench = self.bench
        if bench.deadline_s is not None and phase != STOP and time.monotonic() > bench.deadline_s:
            raise BudgetSpent
        bench.tell(self.candidate, self.round, phase, repeat)
        self._facts, began_s, n_killed = {}, time.monotonic(), oom_kills()
        try:
            yield
        except (EngineError, InputError) as error:
            outcome = outcome_of(error, phase, n_killed)
            self._facts = {name: value for name, value in self._facts.items() if name != "detail"}
            self._write(phase, repeat, outcome, str(error), time.monotonic() - began_s)
            raise _Ended from error
        self._write(phase, repeat, records.OK, self._facts.pop("detail", ""), time.monotonic() - began_s)

    def _write(self, phase: str, repeat: int, outcome: str, detail: str, wall_s: float) -> None:
        from placement.measure.records.schema import Record

        bench = self.bench
        devices, host = self._watch.take() if self._watch is not None else (None, None)
        has_failed = outcome != records.OK
        bench.write(
            Record(
                campaign=bench.campaign,
                at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                key=bench.key,
                round=self.round,
                candidate=self.candidate.name,
                role=self.candidate.role,
                run_id=self.candidate.run_id,
                arguments=self._arguments,
                phase=phase,
                repeat=repeat,
                outcome=outcome,
                detail=detail,
                log_tail=tail(self._log) if has_failed else (),
                log=str(self._log) if self._log is not None else "",
                wall_s=round(wall_s, 3),
                devices=devices,
                host=host,
                model_file=str(bench.model_file.absolute()),
                solved_digest=bench.solved_digest,
                **self._facts,
            )
        )


def _do_fastest_agree(phase: str, result: Sequence[Timing]) -> bool:
    """Whether the two fastest repeats are alike: then neither was held up."""
    times_s = sorted(each.prompt_s if phase == LONG else each.generate_s for each in result)
    return len(times_s) > 1 and times_s[1] <= times_s[0] * (1 + AGREEMENT)


def planned(predicted: Predicted | None, result: EnginePlan) -> Predicted | None:
    """Return the prediction with memory and splits as the engine planned them; the speeds stay estimates."""
    if predicted is None:
        return None
    splits = result.splits_decode if result.splits_decode is not None else predicted.splits_decode
    return predicted.model_copy(
        update={
            "label": "planned",
            "self_mib": {name: round(memory.total_mib, 1) for name, memory in result.devices.items()},
            "splits_decode": splits,
        }
    )


def over_cap_words(result: EnginePlan, caps_mib: dict[str, float]) -> str:
    """Say which devices a plan fills beyond their caps, by how much; "" if none."""
    rows = [
        f"{name} by {memory.total_mib - caps_mib[name]:.0f} MiB"
        for name, memory in result.devices.items()
        if name in caps_mib and memory.total_mib > caps_mib[name]
    ]
    return ", ".join(rows)
