"""Run records → what was measured of each candidate, and which arguments to use: the first user's rules.

No out-of-memory at start-up; none in inference; among the stable the fastest by the workload's turn; equal →
aggressive; aggressive out of memory in some rounds only → moderate; and nothing that measured slower than
llama.cpp's own `--fit`: then `--fit` it is. A pure function of the records.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from placement.inputs.problem import Workload
from placement.measure.records import log as records
from placement.measure.records.phase_names import CANARY, LONG, PLAN, SHORT, STOP
from placement.measure.verify.candidates import FIT, SOLUTION
from placement.measure.verify.phases import MEASURED_PHASES
from placement.measure.verify.times import middle, undisturbed, usual_spread
from placement.predict.solution import AGGRESSIVE, MODERATE

if TYPE_CHECKING:
    from placement.measure.records.schema import DevicePeak, Predicted, Record, Timing

NOT_RUN, PARTIAL = "not run", "not finished"
LEAST_NOISE = 0.01  # no difference below this is told from chance, however alike the rounds are
_OOM = (records.OOM_START, records.OOM_INFERENCE)


@dataclass(frozen=True, slots=True)
class Round:
    """One candidate in one round: how its last attempt ended, and what was measured whenever."""

    status: str  # "ok", "not finished", or a failure's outcome
    detail: str
    log: str
    timings: dict[str, tuple[Timing, ...]]

    @property
    def is_over(self) -> bool:
        """Whether a rerun has nothing to do here."""
        return self.status not in (NOT_RUN, PARTIAL) and self.status not in records.TRANSIENT


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """What is known of one candidate. Speeds are those of its good rounds, in tokens per second.

    `depth_tps` is the decode speed at the canary's depth. None where nothing was measured.
    """

    name: str
    role: str
    run_id: str
    arguments: tuple[str, ...]
    status: str
    n_good: int
    n_rounds: int
    decode_tps: float | None
    depth_tps: float | None
    prompt_tps: float | None
    turns_s: tuple[float, ...]
    load_s: float | None
    splits_decode: int | None
    devices: dict[str, DevicePeak]
    predicted: Predicted | None
    n_host_layers: int | None
    fit_arguments: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def turn_s(self) -> float | None:
        """Seconds of the workload's turn: the middle of the rounds."""
        return middle(self.turns_s) if self.turns_s else None

    @property
    def is_stable(self) -> bool:
        """Whether every round that could be run went well."""
        return self.status == records.OK and bool(self.turns_s)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every candidate's result, the noise floor (a share), the choice (None: nothing is stable) and why."""

    results: tuple[CandidateResult, ...]
    noise: float | None
    recommended: CandidateResult | None
    reasons: tuple[str, ...]
    ties: tuple[str, ...] = field(default=())


def rounds_of(run: Sequence[Record]) -> dict[int, Round]:
    """Return the rounds of one candidate's records, by number."""
    return {
        number: _round([record for record in run if record.round == number])
        for number in sorted({record.round for record in run})
    }


def _round(run: Sequence[Record]) -> Round:
    """A plan begins an attempt; a stop that went well, or a failure, ends it."""
    status, detail, log = PARTIAL, "", ""
    timings: dict[str, dict[int, Timing]] = {phase: {} for phase in MEASURED_PHASES}
    for record in run:
        if record.outcome != records.OK:
            status, detail, log = record.outcome, record.detail, record.log
        elif record.phase == PLAN:
            status, detail, log = PARTIAL, "", ""
        elif record.phase == STOP:
            status = records.OK
        elif record.phase in timings and record.timing is not None:
            timings[record.phase][record.repeat] = record.timing
    return Round(
        status,
        detail,
        log,
        {phase: tuple(result.values()) for phase, result in timings.items()},
    )


def status_of(rounds: Iterable[Round]) -> str:
    """Name a candidate's rounds as a whole."""
    results = [each.status for each in rounds]
    failures = [each for each in results if each not in (records.OK, PARTIAL, *records.TRANSIENT)]
    if failures:
        is_memory = all(each in _OOM for each in failures)
        return records.OOM_INTERMITTENT if is_memory and records.OK in results else failures[0]
    if records.OK in results:
        return records.OK
    return next((each for each in results if each in records.TRANSIENT), PARTIAL if results else NOT_RUN)


def _per_token(timings: Sequence[Timing]) -> float | None:
    """Seconds of a generated token."""
    values = [each.generate_s / each.n_generated for each in timings if each.n_generated]
    return undisturbed(values) if values else None


def _per_prompt_token(timings: Sequence[Timing]) -> float | None:
    """Seconds of a token that is read."""
    values = [each.prompt_s / each.n_prompt for each in timings if each.n_prompt]
    return undisturbed(values) if values else None


def turn_seconds(result: Round, workload: Workload) -> float | None:
    """Return the seconds of the workload's turn by a round's timings; None if a phase is missing.

    A token's time is linear in the depth it is generated at: the short prompt and the canary give the line.
    """
    shorts, longs, canaries = (result.timings[phase] for phase in (SHORT, LONG, CANARY))
    short_s, prompt_s = _per_token(shorts), _per_prompt_token(longs)
    if short_s is None or prompt_s is None:
        return None
    token_s = short_s
    deep_s = _per_token(canaries)
    if deep_s is not None:
        at_short = shorts[0].n_prompt + shorts[0].n_generated / 2
        at_deep = canaries[0].n_prompt + canaries[0].n_generated / 2
        wanted = workload.depth_tokens + workload.prompt_tokens + workload.generate_tokens / 2
        if at_deep > at_short:
            slope = max(0.0, (deep_s - short_s) / (at_deep - at_short))
            token_s = max(min(short_s, deep_s), short_s + slope * (wanted - at_short))
    return workload.prompt_tokens * prompt_s + workload.generate_tokens * token_s


def result_of(run: Sequence[Record], workload: Workload) -> CandidateResult:
    """Return the result of one candidate's records."""
    rounds = rounds_of(run)
    good = [each for each in rounds.values() if each.status == records.OK]
    turns = [turn for turn in (turn_seconds(each, workload) for each in good) if turn is not None]
    starts = [record for record in run if record.phase == "start" and record.outcome == records.OK]
    plans = [record for record in run if record.phase == PLAN and record.outcome == records.OK]
    last = (plans or run)[-1]
    return CandidateResult(
        name=run[-1].candidate,
        role=run[-1].role,
        run_id=run[-1].run_id,
        arguments=last.arguments,
        status=status_of(rounds.values()),
        n_good=len(good),
        n_rounds=len(rounds),
        decode_tps=_speed(_per_token(each.timings[SHORT]) for each in good),
        depth_tps=_speed(_per_token(each.timings[CANARY]) for each in good),
        prompt_tps=_speed(_per_prompt_token(each.timings[LONG]) for each in good),
        turns_s=tuple(turns),
        load_s=statistics.median(record.wall_s for record in starts) if starts else None,
        splits_decode=starts[-1].splits_decode if starts else None,
        devices=_peaks(run),
        predicted=last.predicted,
        n_host_layers=last.n_host_layers,
        fit_arguments=last.fit_arguments,
        notes=_notes(run, rounds),
    )


def _speed(seconds: Iterable[float | None]) -> float | None:
    """Tokens per second over some rounds."""
    known = [each for each in seconds if each]
    return 1.0 / middle(known) if known else None


def _peaks(run: Sequence[Record]) -> dict[str, DevicePeak]:
    """The record with the highest peak of each device."""
    peaks: dict[str, DevicePeak] = {}
    for record in run:
        for name, peak in (record.devices or {}).items():
            if name not in peaks or peak.peak_mib > peaks[name].peak_mib:
                peaks[name] = peak
    return peaks


def _notes(run: Sequence[Record], rounds: dict[int, Round]) -> tuple[str, ...]:
    notes = [
        f"round {number}: {each.status}" + (f" ({each.detail})" if each.detail else "")
        for number, each in rounds.items()
        if each.status not in (records.OK, PARTIAL)
    ]
    notes += dict.fromkeys(record.detail for record in run if record.outcome == records.OK and record.detail)
    swapped = max((record.host.swapped_mib or 0.0 for record in run if record.host), default=0.0)
    return (*notes, f"the host swapped {swapped:.0f} MiB out") if swapped >= 1 else tuple(notes)


def noise_floor(results: Iterable[CandidateResult]) -> float | None:
    """Return the share below which turns are equal: twice the spread of rounds about their medians.

    The spread is that of the usual round: a few that were disturbed do not make the others unsure. None where no
    candidate has two good rounds.
    """
    off = [
        abs(turn / statistics.median(result.turns_s) - 1) * math.sqrt(n / (n - 1))
        for result in results
        if (n := len(result.turns_s)) >= 2
        for turn in result.turns_s
    ]
    return max(LEAST_NOISE, 2 * usual_spread(off)) if off else None


def decide(run: Sequence[Record], workload: Workload) -> Verdict:
    """Apply the rules to the records of one campaign."""
    ids = list(dict.fromkeys(record.run_id for record in run))
    results = [result_of([record for record in run if record.run_id == each], workload) for each in ids]
    noise = noise_floor(results)
    picked, reasons, ties = _choose(results, noise if noise is not None else LEAST_NOISE)
    fits = [each for each in results if each.role == FIT and each.is_stable]
    if picked is not None and picked.role == SOLUTION and fits:
        fit = min(fits, key=_turn)
        faster = _turn(fit) / _turn(picked) - 1
        inside = (
            ", inside the noise" if faster <= _least_difference(noise or LEAST_NOISE, fit, picked) else ""
        )
        reasons.append(f"{picked.name} is {faster:.1%} faster than llama.cpp's own {fit.name}{inside}")
    if noise is None:
        reasons.append(
            f"no candidate has two good rounds: the noise is unknown, {LEAST_NOISE:.0%} is taken for it"
        )
    return Verdict(tuple(results), noise, picked, tuple(reasons), ties)


def _turn(result: CandidateResult) -> float:
    return result.turn_s if result.turn_s is not None else math.inf


def _choose(
    results: Sequence[CandidateResult], noise: float
) -> tuple[CandidateResult | None, list[str], tuple[str, ...]]:
    stable = [each for each in results if each.role == SOLUTION and each.is_stable]
    fits = [each for each in results if each.role == FIT and each.is_stable]
    fit = min(fits, key=_turn, default=None)
    reasons = [f"{each.name} is out: {each.status}" for each in results if _is_out(each)]
    if fit is None:
        reasons.append("no --fit baseline was measured: whether it is faster is unknown")
    slower = [each for each in stable if fit is not None and _turn(each) > _turn(fit)]
    for each in slower:
        assert fit is not None
        reasons.append(
            f"{each.name} is {_turn(each) / _turn(fit) - 1:.1%} slower than llama.cpp's own {fit.name}"
        )
    eligible = [each for each in stable if each not in slower]
    if not eligible:
        if fit is None:
            return None, [*reasons, "nothing ran without failing: there is nothing to recommend"], ()
        return (
            fit,
            [*reasons, f"llama.cpp's own --fit is recommended: {fit.name}, nothing stable is faster"],
            (),
        )
    return _pick(results, eligible, noise, reasons)


def _is_out(result: CandidateResult) -> bool:
    return result.status not in (records.OK, PARTIAL, NOT_RUN)


def _pick(
    results: Sequence[CandidateResult], eligible: Sequence[CandidateResult], noise: float, reasons: list[str]
) -> tuple[CandidateResult, list[str], tuple[str, ...]]:
    """Of what no `--fit` beats: moderate if aggressive is unsure, else the fastest, aggressive if equal."""
    named = {each.name: each for each in eligible}
    statuses = {each.name: each.status for each in results}
    if statuses.get(AGGRESSIVE) == records.OOM_INTERMITTENT and MODERATE in named:
        reasons.append("aggressive ran out of memory in some rounds only: moderate is recommended")
        return named[MODERATE], reasons, ()
    fastest = min(eligible, key=_turn)
    ties = [
        each
        for each in eligible
        if _turn(each) / _turn(fastest) - 1 <= _least_difference(noise, each, fastest)
    ]
    if len(ties) == 1:
        reasons.append(f"{fastest.name} is the fastest of the stable: a turn takes {_turn(fastest):.3g} s")
        return fastest, reasons, ()
    names = tuple(each.name for each in ties)
    picked = min(ties, key=lambda each: (each.name != AGGRESSIVE, _host_layers(each), _turn(each)))
    reasons.append(
        f"{', '.join(names)} tie: over their rounds, turns differ by less than a noise of {noise:.1%} a round; "
        f"{picked.name} has more on the GPUs"
    )
    return picked, reasons, names


def _least_difference(noise: float, one: CandidateResult, other: CandidateResult) -> float:
    """What two turns must differ by to be told apart: the more rounds they had, the less."""
    rounds = (max(len(each.turns_s), 1) for each in (one, other))
    return max(LEAST_NOISE, noise * math.sqrt(sum(1 / n for n in rounds) / 2))


def _host_layers(result: CandidateResult) -> int:
    return result.n_host_layers if result.n_host_layers is not None else 1 << 30
