"""One run's records → rows: the times of its tokens and prompts, their noise, and what was disturbed.

A phase that was asked for something else, as after another `--repeats` or `--full-depth`, is a row of its own.
What one timing is off by comes from the repeats of the run; where a run has none, from those of the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from placement.inputs.problem import Workload
from placement.measure.calibrate.data import Run
from placement.measure.calibrate.features import TimingRow, decode_row, prompt_row
from placement.measure.records.log import OK
from placement.measure.records.phase_names import CANARY, LONG, SHORT
from placement.measure.verify.times import undisturbed, usual_spread

if TYPE_CHECKING:
    from placement.measure.records.schema import Record, Timing

LEAST_TIMING_NOISE = 0.005
SHORT_PROMPT_NOISE = 0.15  # a prompt of one small ubatch measures start-up as much as work
SLOW_ROUND = 0.08  # slower than the run's others by so much: disturbed
NOISE_OF_SLOW = 3.0  # unless the run's timings differ by a third of it anyway
SWAPPED_MIB = 16.0
LEAST_SECONDS = 1e-7  # less is no time of a token, and no clock's


@dataclass(frozen=True, slots=True)
class _Value:
    """One measured time: of a token at a depth, or of a whole prompt."""

    round: tuple[str, int]
    n_tokens: int
    seconds: float
    doubt: str
    noise: float = LEAST_TIMING_NOISE


def timing_noise(records: Sequence[Record]) -> float | None:
    """What one timing of a run is off by, as a share, from its repeated tokens; None where nothing was repeated."""
    times: dict[tuple[str, int, int], list[float]] = {}
    for record, timing, doubt in _timings(records, SHORT):
        if not doubt and timing.n_generated:
            key = (record.campaign, record.round, timing.n_prompt)
            times.setdefault(key, []).append(timing.generate_s / timing.n_generated)
    squares = sum(
        sum((each / statistics.median(found) - 1.0) ** 2 for each in found)
        for found in times.values()
        if len(found) > 1
    )
    degrees = sum(len(found) - 1 for found in times.values())
    return float((squares / degrees) ** 0.5) if degrees else None


def run_rows(run: Run, records: Sequence[Record], noise: float) -> Iterator[TimingRow]:
    """The rows of a run; `noise` is what one of its timings is off by, as a share."""
    noise = max(noise, LEAST_TIMING_NOISE)
    for phase in (SHORT, CANARY):
        values = [
            _Value(
                (record.campaign, record.round),
                timing.n_prompt + timing.n_generated // 2,
                timing.generate_s / timing.n_generated,
                doubt,
                noise,
            )
            for record, timing, doubt in _timings(records, phase)
            if timing.n_generated and timing.generate_s > LEAST_SECONDS
        ]
        yield from _phase_rows(run, phase, values, is_prompt=False)
    for phase in (SHORT, LONG, CANARY):
        values = [
            _Value((record.campaign, record.round), timing.n_prompt, timing.prompt_s, doubt, noise)
            for record, timing, doubt in _timings(records, phase)
            if timing.n_prompt and timing.prompt_s > LEAST_SECONDS
        ]
        yield from _phase_rows(run, phase, values, is_prompt=True)


def _timings(records: Sequence[Record], phase: str) -> Iterable[tuple[Record, Timing, str]]:
    for record in records:
        if record.phase == phase and record.outcome == OK and record.timing is not None:
            swapped = (record.host.swapped_mib or 0.0) if record.host is not None else 0.0
            doubt = f"the host swapped {swapped:.0f} MiB meanwhile" if swapped >= SWAPPED_MIB else ""
            yield record, record.timing, doubt


def _phase_rows(run: Run, phase: str, values: list[_Value], is_prompt: bool) -> Iterator[TimingRow]:
    for n_tokens in dict.fromkeys(value.n_tokens for value in values):
        mine = [value for value in values if value.n_tokens == n_tokens]
        yield from _rows_alike(run, phase, mine, is_prompt)


def _rows_alike(run: Run, phase: str, values: list[_Value], is_prompt: bool) -> Iterator[TimingRow]:
    """One row of what was undisturbed, its noise from the rounds' spread; one more of each disturbed round."""
    by_round: dict[tuple[str, int], list[_Value]] = {}
    for value in values:
        by_round.setdefault(value.round, []).append(value)
    each_round = {number: _of_round(found) for number, found in by_round.items()}
    good = [value for value in each_round.values() if not value.doubt]
    usual_s, most_s = _usual(good)
    calm = [value for value in good if value.seconds <= most_s]
    if calm:
        yield _row(run, phase, calm, is_prompt, "")
    for (_, number), value in each_round.items():
        if value in calm:
            continue
        slower = value.seconds / usual_s - 1 if usual_s else 0.0
        doubt = (
            value.doubt
            or f"round {number} was {slower:.0%} slower than the run's others: a hot or busy machine?"
        )
        yield _row(run, phase, [value], is_prompt, doubt)


def _usual(values: Sequence[_Value]) -> tuple[float, float]:
    """(seconds of an undisturbed round, the most that noise alone makes of them): of two rounds the faster counts."""
    times = [value.seconds for value in values]
    if not times:
        return 0.0, 0.0
    usual_s, off = min(times), max(value.noise for value in values)
    if len(times) > 2:
        usual_s = statistics.median(times)
        off = max(off, usual_spread(abs(each / usual_s - 1.0) for each in times))
    return usual_s, usual_s * (1.0 + max(SLOW_ROUND, NOISE_OF_SLOW * off))


def _of_round(values: Sequence[_Value]) -> _Value:
    """The repeats of one round as one value."""
    every = [value.seconds for value in values]
    noise = max(_spread(every), values[0].noise / len(every) ** 0.5)
    doubt = next((value.doubt for value in values if value.doubt), "")
    return replace(values[0], seconds=undisturbed(every), doubt=doubt, noise=noise)


def _spread(seconds: Sequence[float]) -> float:
    """Standard error of the middle of some times, as a share."""
    if len(seconds) < 2:
        return LEAST_TIMING_NOISE
    return float(statistics.stdev(seconds) / statistics.median(seconds) / len(seconds) ** 0.5)


def _row(run: Run, phase: str, values: Sequence[_Value], is_prompt: bool, doubt: str) -> TimingRow:
    seconds = [value.seconds for value in values]
    middle, n_tokens = statistics.median(seconds), values[0].n_tokens
    noise = max(_spread(seconds), *(value.noise / len(values) ** 0.5 for value in values))
    if is_prompt and phase == SHORT:
        noise = max(noise, SHORT_PROMPT_NOISE)
    workload = Workload(n_tokens, 1, 0) if is_prompt else Workload(1, 1, n_tokens)
    make: Any = prompt_row if is_prompt else decode_row
    row: TimingRow = make(
        replace(run.problem, workload=workload), run.assignment, run.counts, run=run.id,
        measured_s=middle, noise=noise, label=f"{run.name}, {phase}", doubt=doubt,
    )  # fmt: skip
    return row
