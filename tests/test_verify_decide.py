"""The first user's decision rules, on records made by hand."""

from __future__ import annotations

import pytest
from verify_support import DevicePeak, HostPeak, Predicted, Record, good_round, record

from placement.cli.show.verify_tables import header, rows, verify_row, verify_summary
from placement.inputs.problem import Workload
from placement.measure.verify.decide import Verdict, decide, noise_floor, result_of, rounds_of, turn_seconds
from placement.measure.verify.run import VerifyReport

WORKLOAD = Workload(prompt_tokens=1000, generate_tokens=100, depth_tokens=0)


def rounds(name: str, *token_s: float) -> list[Record]:
    """One good round for each time of a token."""
    return [each for i, seconds in enumerate(token_s, start=1) for each in good_round(name, i, seconds)]


def failed(name: str, phase: str, outcome: str, round_: int = 1) -> list[Record]:
    """A round that failed in a phase."""
    return [
        record("plan", name=name, round_=round_),
        record(phase, outcome, name=name, round_=round_, detail="x"),
    ]


def verdict(*runs: list[Record]) -> Verdict:
    return decide([each for run in runs for each in run], WORKLOAD)


def picked(*runs: list[Record]) -> str | None:
    result = verdict(*runs).recommended
    return None if result is None else result.name


FIT = rounds("fit:aggressive", 0.05, 0.05)


def test_turn_is_prompt_and_generation() -> None:
    """1000 prompt tokens at 1 ms and 100 generated at 10 ms take 2 s."""
    assert turn_seconds(rounds_of(good_round("a"))[1], WORKLOAD) == pytest.approx(2.0)


def test_turn_follows_depth() -> None:
    """With tokens of 10 ms near the start and 20 ms at the canary's depth, a turn in the middle has 15 ms."""
    run = good_round("a")
    canary = run[5].model_copy(update={"timing": run[5].timing.model_copy(update={"generate_s": 0.2})})
    at_short, at_deep = 10 + 50, 256 + 5
    workload = Workload(1, 2, round((at_short + at_deep) / 2) - 2)
    turn = turn_seconds(rounds_of([*run[:5], canary, run[6]])[1], workload)
    assert turn == pytest.approx(0.001 + 2 * 0.015, rel=0.01)


def test_fastest_stable_wins() -> None:
    """Of three stable candidates the one with the shortest turn is recommended."""
    assert picked(
        rounds("moderate", 0.03, 0.03), rounds("other", 0.01, 0.01), rounds("aggressive", 0.02, 0.02), FIT
    ) == ("other")


def test_tie_goes_to_aggressive() -> None:
    """A difference inside the noise is a tie, and aggressive wins it."""
    result = verdict(rounds("moderate", 0.0100, 0.0104), rounds("aggressive", 0.0102, 0.0105), FIT)
    assert result.recommended is not None and result.recommended.name == "aggressive"
    assert result.ties == ("moderate", "aggressive")


def test_difference_beyond_the_noise_is_no_tie() -> None:
    """When the rounds agree closely a difference of 5 % decides against aggressive."""
    run = (rounds("moderate", 0.0100, 0.0100, 0.0100), rounds("aggressive", 0.0110, 0.0110, 0.0110), FIT)
    assert verdict(*run).ties == ()
    assert picked(*run) == "moderate"


def test_more_rounds_tell_less_apart() -> None:
    """A difference of 20 % is a tie after two rounds that differ by 30 %, and none after eight such pairs."""
    few = verdict(rounds("moderate", 0.010, 0.013), rounds("aggressive", 0.012, 0.0156), FIT)
    many = verdict(rounds("moderate", *[0.010, 0.013] * 8), rounds("aggressive", *[0.012, 0.0156] * 8), FIT)
    assert few.ties == ("moderate", "aggressive")
    assert many.ties == ()
    assert many.recommended is not None and many.recommended.name == "moderate"


@pytest.mark.parametrize(
    ("phase", "outcome"), [("start", "oom-at-start"), ("long prompt", "oom-in-inference"), ("canary", "crash"),
                           ("short prompt", "hang"), ("start", "refused")],
)  # fmt: skip
def test_failing_candidate_is_out(phase: str, outcome: str) -> None:
    """Whatever fails in every round is never recommended, and the reason names the outcome."""
    result = verdict(rounds("moderate", 0.03, 0.03), failed("aggressive", phase, outcome), FIT)
    assert result.recommended is not None and result.recommended.name == "moderate"
    assert f"aggressive is out: {outcome}" in result.reasons


def test_intermittent_oom_goes_to_moderate() -> None:
    """Aggressive out of memory in one round of two makes moderate the choice, a faster other notwithstanding."""
    run = [*good_round("aggressive", 1), *failed("aggressive", "canary", "oom-in-inference", 2)]
    result = verdict(rounds("moderate", 0.03, 0.03), run, rounds("other", 0.02, 0.02), FIT)
    statuses = {each.name: each.status for each in result.results}
    assert statuses["aggressive"] == "oom-intermittent"
    assert result.recommended is not None and result.recommended.name == "moderate"


@pytest.mark.parametrize("slower", [0.0501, 0.06, 0.5])
def test_slower_than_fit_is_never_recommended(slower: float) -> None:
    """A candidate that measured slower than --fit, be it within the noise, loses to --fit's own arguments."""
    result = verdict(rounds("aggressive", slower, slower), rounds("fit:aggressive", 0.05, 0.05))
    assert result.recommended is not None and result.recommended.name == "fit:aggressive"
    assert any("--fit is recommended" in reason for reason in result.reasons)


def test_intermittent_rule_does_not_override_fit() -> None:
    """Moderate is not selected for an unsure aggressive when it is slower than --fit."""
    run = [*good_round("aggressive", 1), *failed("aggressive", "start", "oom-at-start", 2)]
    assert picked(rounds("moderate", 0.06, 0.06), run, FIT) == "fit:aggressive"


def test_failed_fit_is_no_baseline() -> None:
    """Where --fit itself fails the fastest stable is recommended, and that it is not compared is said."""
    result = verdict(rounds("aggressive", 0.5, 0.5), failed("fit:aggressive", "start", "oom-at-start"))
    assert result.recommended is not None and result.recommended.name == "aggressive"
    assert any("no --fit baseline" in reason for reason in result.reasons)


def test_nothing_stable_is_no_recommendation() -> None:
    """When all fail nothing is recommended."""
    assert picked(failed("aggressive", "start", "crash"), failed("fit:aggressive", "start", "crash")) is None


def test_unfinished_round_is_not_stability() -> None:
    """A round without its stop is not finished, and a candidate with no other is not recommended."""
    assert picked(good_round("aggressive")[:-1], FIT) == "fit:aggressive"


def test_later_attempt_replaces_a_transient_failure() -> None:
    """A round whose port was taken and that went well when run again is a good round."""
    result = result_of([*failed("aggressive", "start", "port-taken"), *good_round("aggressive")], WORKLOAD)
    assert (result.status, result.n_good) == ("ok", 1)


def test_transient_failure_in_one_round_keeps_the_others() -> None:
    """A lost worker in one round does not make the arguments unstable."""
    run = [*good_round("aggressive", 1), *failed("aggressive", "canary", "worker-lost", 2)]
    assert result_of(run, WORKLOAD).is_stable


def test_noise_is_pooled_over_candidates() -> None:
    """Rounds 2 % apart in each of two candidates give a floor of twice the spread that makes such pairs usual."""
    results = [result_of(rounds(name, 0.0099, 0.0101), WORKLOAD) for name in ("a", "b")]
    usual = 2**0.5 * 0.005 / 0.6745  # each turn is 0.5 % from its median
    assert noise_floor(results) == pytest.approx(2 * usual, rel=0.01)


def test_one_disturbed_round_is_no_noise() -> None:
    """A first round that took twenty times as long says nothing of the others, which are alike within 1 %."""
    results = [
        result_of(rounds("a", 0.2, 0.01, 0.0101, 0.0099), WORKLOAD),
        result_of(rounds("b", 0.0099, 0.0101, 0.01), WORKLOAD),
    ]
    assert noise_floor(results) <= 0.05
    assert results[0].turn_s == pytest.approx(2.0, rel=0.01)


def test_a_disturbed_repeat_does_not_count() -> None:
    """Of ten repeats of a round six were held up: the speed is that of the others."""
    run = good_round("a")
    times_s = (1.0, 2.0, 3.0, 1.5, 1.01, 4.0, 1.0, 2.5, 1.02, 5.0)
    shorts = [
        run[3].model_copy(
            update={"repeat": i, "timing": run[3].timing.model_copy(update={"generate_s": seconds})}
        )
        for i, seconds in enumerate(times_s)
    ]
    result = result_of([*run[:3], *shorts, *run[4:]], WORKLOAD)
    assert result.decode_tps == pytest.approx(100, rel=0.01)


def test_one_round_has_no_noise() -> None:
    """With one round each the noise is unknown, not 0, and that is said."""
    result = verdict(good_round("aggressive"), good_round("fit:aggressive", 1, 0.05))
    assert result.noise is None
    assert any("the noise is unknown" in reason for reason in result.reasons)


def table_report() -> VerifyReport:
    predicted = Predicted(
        label="planned", self_mib={"CUDA0": 17101, "Host": 5}, splits_decode=3, decode_tps=140.0
    )
    run = rounds("aggressive", 0.01, 0.01)
    run[0] = run[0].model_copy(update={"predicted": predicted})
    run[7] = run[7].model_copy(update={"predicted": predicted})
    peak = DevicePeak(peak_mib=18361, total_mib=24576, cap_mib=23520)
    run[5] = run[5].model_copy(update={"devices": {"CUDA0": peak}, "host": HostPeak(swapped_mib=50)})
    return VerifyReport(verdict(run, FIT), "c", WORKLOAD, True, len(run))


def test_table_shows_measured_beside_predicted() -> None:
    """The table has the card's MiB and share, splits and the t/s at depth, each with what was predicted."""
    report = table_report()
    cells = dict(zip(header(report), rows(report)[0], strict=True))
    assert cells["candidate"] == "aggressive *"
    assert cells["CUDA0 MiB"] == "18361 75% (17101)"
    assert cells["splits bs=1"] == "3 (3)"
    assert (cells["t/s"], cells["at depth"]) == ("100.0", "100.0 (140.0)")
    assert cells["OOM?"] == "no"
    assert "swapped 50 MiB" in cells["notes"]


def test_unknown_is_a_dash() -> None:
    """What was not measured is a dash, never 0."""
    report = VerifyReport(verdict(failed("aggressive", "start", "oom-at-start")), "c", WORKLOAD, True, 2)
    cells = dict(zip(header(report), rows(report)[0], strict=True))
    assert (cells["t/s"], cells["turn s"], cells["OOM?"]) == ("-", "-", "at start")


def test_json_has_the_choice() -> None:
    """The JSON names the recommended candidate, its command and every result."""
    row = verify_row(table_report(), "m", "x", "/m.gguf")
    assert row["recommended"] == "aggressive"
    assert row["command"] == "llama-server -m /m.gguf -ngl aggressive"
    assert [each["name"] for each in row["results"]] == ["aggressive", "fit:aggressive"]


def test_summary_tells_the_noise_floor() -> None:
    """The floor below which differences are ties stands in the summary."""
    assert any("noise floor" in line for line in verify_summary(table_report()))
