"""The Pareto front: placements that no other beats in decode speed, prompt speed and smallest headroom at once; and
the best placements that differ from each other.

The Pareto front is walked by epsilon constraints: under each of a few reserves the fastest decode, then the fastest
decode whose prompts are a good deal faster than the last one's, and so on until nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from placement.solve.search.configurations import SearchSpace
from placement.solve.search.search import Search
from placement.solve.search.subproblems import Candidate

RESERVES = (0.0, 0.05, 0.15)  # of each card's total
FASTER = 0.8  # each step's prompt takes at most that share of the last one's
PARETO_GAP = 0.02
PARETO_WORK = 0.1  # CP-SAT's deterministic time for one proof; what is then open stands as the row's gap
DECODE_FIRST = (1000, 1)

Merit = tuple[float, float, float]  # decode and prompt tokens per second, MiB of headroom


def walk(search: Search, space: SearchSpace, tell: Callable[[str], None]) -> Iterator[Candidate]:
    """Candidates of the Pareto front, each the fastest decode at its prompt speed and reserve, within 2 %."""
    for reserve in RESERVES:
        limited = replace(
            space,
            decode_weight=DECODE_FIRST[0],
            prompt_weight=DECODE_FIRST[1],
            reserve_fraction=max(reserve, space.reserve_fraction),
        )
        while (result := _next(search, limited)) is not None:
            tell(f"the Pareto front: {result.speed.prompt_tps or 0:,.0f} t/s prompt")
            yield result
            # a frame's prompt may be counted a few splits shorter than it is: the limit falls all the same
            last_s = min(result.speed.prompt_s, limited.max_prompt_s or math.inf)
            limited = replace(limited, max_prompt_s=last_s * FASTER)


def _next(search: Search, space: SearchSpace) -> Candidate | None:
    return search.best(space, search.lower_bounds(space), PARETO_GAP, work_limit=PARETO_WORK)


def best_different(
    search: Search, space: SearchSpace, first: Candidate, n: int, tell: Callable[[str], None]
) -> list[Candidate]:
    """The `n` best placements that differ in a range of layers or in two layers' groups, the first one included."""
    lower_bounds, results = search.lower_bounds(space), [first]
    while len(results) < n:
        tell(f"the best {len(results) + 1}")
        following = search.best(space, lower_bounds, taken=results)
        if following is None:
            break
        results.append(following)
    return results


def is_dominated(merit: Merit, by: Sequence[Merit]) -> bool:
    """Whether another point is as good everywhere within 0.2 % and 8 MiB; ties count as dominated."""
    return any(d >= merit[0] * 0.998 and p >= merit[1] * 0.998 and h >= merit[2] - 8.0 for d, p, h in by)


def spread(merits: Sequence[Merit], n_kept: int, n: int) -> list[int]:
    """Which `n` points to show where there are more: the first `n_kept`, then always the one farthest from those."""
    shown = list(range(min(n_kept, n, len(merits))))
    rest = [i for i in range(len(merits)) if i not in shown]
    scale = max((merit[2] for merit in merits), default=0.0) or 1.0

    def distance(i: int) -> float:
        return min((_apart(merits[i], merits[j], scale) for j in shown), default=math.inf)

    while rest and len(shown) < n:
        farthest = max(rest, key=distance)
        shown.append(farthest)
        rest.remove(farthest)
    return sorted(shown)


def _apart(one: Merit, other: Merit, scale_mib: float) -> float:
    """How far two points are apart, in shares of speed and of the largest headroom."""
    speeds = (abs(math.log(max(a, 1e-9) / max(b, 1e-9))) for a, b in zip(one[:2], other[:2], strict=True))
    return math.hypot(*speeds, (one[2] - other[2]) / scale_mib)
