"""Largest context, most headroom, best KV type, comparisons, and why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solving_support import dense_model, expert_model, one_card, two_cards

from placement.solve.questions import choose_kv_type, compare, largest, max_context, max_headroom
from placement.solve.request import FixedSettings, Request
from placement.solve.solve import best_choice, make_problem, solve_request
from placement.solve.why import MORE_MIB, next_best_line, next_layer_lines, sensitivity

MODEL = expert_model()
TIGHT = two_cards(500.0, 400.0)


@given(low=st.integers(0, 50), width=st.integers(0, 200), limit=st.integers(-5, 300))
def test_largest_is_the_last_possible(low: int, width: int, limit: int) -> None:
    """Bisection finds the last number that is possible, or that none is."""
    expected = min(low + width, limit) if limit >= low else None
    assert expected == largest(low, low + width, lambda n: n <= limit)


def test_largest_context_fits_and_the_next_does_not() -> None:
    """The context found keeps everything on the GPUs; 1,024 tokens more do not."""
    model, machine = dense_model(), one_card(190.0)
    found, words = max_context(model, machine, Request())
    assert found is not None
    assert found.ctx_tokens is not None
    assert "everything on the GPUs" == words

    def host_layers(ctx_tokens: int) -> int | None:
        problem, _ = make_problem(model, machine, replace(found, ctx_tokens=ctx_tokens))
        best = best_choice(problem, Request())
        return None if best is None else best.n_host_layers()

    assert 0 == host_layers(found.ctx_tokens)
    assert found.ctx_tokens < 32768
    assert 0 != host_layers(found.ctx_tokens + 1024)


def test_headroom_keeps_the_speed_asked_for() -> None:
    """The largest reserve still decodes as fast as asked for, and is larger than none."""
    fastest = solve_request(MODEL, TIGHT, Request()).solutions[0].speed.decode_tps
    asked = Request(min_decode_tps=fastest * 0.7)
    found = max_headroom(MODEL, TIGHT, asked)
    assert found is not None
    assert found.reserve_mib > 0
    best = solve_request(MODEL, TIGHT, found).solutions[0]
    assert best.speed.decode_tps >= fastest * 0.7 * 0.999
    assert best.headroom_mib >= 0


def test_impossible_speed_is_said() -> None:
    """A decode speed beyond the machine gives no solution and says that none is so fast."""
    result = solve_request(MODEL, TIGHT, Request(min_decode_tps=1e6))
    assert result.solutions == ()
    assert re.match(
        r"no placement decodes 1e\+06 tokens per second: the fastest .* decodes \d+\.\d\d$", result.message
    )


def test_roomy_machine_keeps_the_best_kv_type() -> None:
    """With memory to spare the KV cache stays f16 unless a smaller type is over 5 % faster."""
    chosen, words = choose_kv_type(MODEL, two_cards(4000.0, 4000.0), Request())
    assert "f16" == chosen
    assert "q8_0" in words


def test_kv_type_that_is_fixed_is_named_as_it_is() -> None:
    """Beside a K type that the request keeps, what is told is the pair that was solved for."""
    asked = Request(fixed=FixedSettings(kv_type_k="q8_0"))
    _, words = choose_kv_type(MODEL, two_cards(4000.0, 4000.0), asked)
    assert "q8_0/f16 " in words and "q8_0/q4_0 " in words


def test_comparison_puts_the_fastest_first() -> None:
    """Models are rated by their turn, and one that does not fit comes last without a placement."""
    small, large, huge = expert_model(4), expert_model(8), expert_model(40)
    rated = compare([huge, large, small], two_cards(500.0, 400.0, host_mib=1500.0), Request())
    assert [small, large, huge] == [each.model for each in rated]
    assert rated[-1].best is None


def test_next_tensors_do_not_fit() -> None:
    """What a full card would need for its next experts is more than it has left."""
    result = solve_request(MODEL, TIGHT, Request())
    problem, _ = make_problem(MODEL, TIGHT, Request())
    lines = list(next_layer_lines(problem, result.solutions[0]))
    assert lines
    for line in lines:
        need, left = (
            float(words.replace(",", "").split()[-2 if "MiB" in words else -3]) for words in _figures(line)
        )
        assert left < need


def _figures(line: str) -> tuple[str, str]:
    need, left = (
        line.split(":")[1].split(",", 1) if line.count(",") == 1 else line.split(": ")[1].rsplit(", ", 1)
    )
    return need.replace("the next expert tensors need", "").strip(), left.replace(" are left", " x left")


def test_more_memory_helps_a_tight_machine() -> None:
    """Where experts stay in host memory, 500 MiB more on a card shorten a turn, and that is said."""
    problem, _ = make_problem(MODEL, TIGHT, Request())
    lines = list(sensitivity(problem, solve_request(MODEL, TIGHT, Request()), Request()))
    assert [f"+{MORE_MIB:.0f} MiB on {name}" for name in ("CUDA0", "CUDA1")] == [
        x.split(" would")[0] for x in lines
    ]
    assert any("off a turn" in line for line in lines)


def test_next_best_costs_something() -> None:
    """The next best of the shown placements is told with what it costs of a turn."""
    line = next_best_line(solve_request(MODEL, TIGHT, Request()))
    assert line is not None
    assert line.startswith("next best: ")
    assert float(line.split("takes ")[1].split("%")[0]) >= -0.3


@pytest.mark.parametrize("objective", ["decode", "prompt"])
def test_objective_is_never_beaten_by_the_turn(objective: str) -> None:
    """The best placement for decode (or prompts) alone is at least as good at it as the turn's, within the gap."""
    asked = solve_request(MODEL, TIGHT, Request(objective=objective)).solutions[0].speed
    turn = solve_request(MODEL, TIGHT, Request()).solutions[0].speed
    if objective == "decode":
        assert asked.decode_tps >= turn.decode_tps * 0.995
    else:
        assert (asked.prompt_tps or 0) >= (turn.prompt_tps or 0) * 0.995
