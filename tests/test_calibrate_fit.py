"""Coefficients from timings of machines whose truth is known."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from machine_simulator import MACHINES, Simulated, bare_machine, no_card, placements, pool

from placement.inputs.machine import Coefficient
from placement.measure.calibrate.features import TimingRow, predict_s
from placement.measure.calibrate.fit import Calibration, calibrate, with_values
from placement.predict.cost import evaluate
from placement.predict.terms import DECODE, PROMPT, Phase

DENSE = "gemma-3-27b-q4"


@pytest.fixture(scope="module")
def decode() -> tuple[TimingRow, ...]:
    return pool()[0]


def learn(simulated: Simulated, rows: list[TimingRow], with_errors: bool = False) -> Calibration:
    return calibrate(bare_machine(), rows, with_errors=with_errors)


@pytest.mark.parametrize("kind", [DECODE, PROMPT])
def test_terms_sum_to_the_speed_model(kind: Phase) -> None:
    """The terms of a placement give exactly what `cost.evaluate` says, whatever the coefficients."""
    simulated = Simulated(5)
    for placed, *rows in zip(placements(), *pool(), strict=True):
        speed = evaluate(replace(placed.problem, machine=simulated.machine), placed.assignment, placed.counts)
        expected = speed.decode_s if kind == DECODE else speed.prompt_s
        assert predict_s(rows[kind == PROMPT], simulated.machine) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [DECODE, PROMPT])
def test_the_fit_predicts_what_the_speed_model_says(kind: Phase) -> None:
    """A fit's matrices and `cost.evaluate`'s arithmetic are the same, pipelined prompts included."""
    simulated, rows = Simulated(6), pool()[kind == PROMPT]
    fit = calibrate(bare_machine(), simulated.runs(rows[:12]), kind, with_errors=False)
    seconds, _ = fit.predict(rows)
    machine = with_values(bare_machine(), fit)
    assert seconds == pytest.approx([predict_s(row, machine) for row in rows], rel=1e-9)


MAIN = ("read_efficiency", "cpu_read_efficiency", "split_us", "node_us", "expert_read_share")


def median_error(n_runs: int, noise: float, seeds: range, name: str = "qwen3-30b-a3b-q4") -> float:
    """Median error of decode speeds of placements not run, over machines."""
    rows, errors = pool(name)[0], []
    for seed in seeds:
        simulated = Simulated(seed, noise=noise)
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        fit = learn(simulated, simulated.runs([rows[i] for i in order[:n_runs]]))
        rest = [rows[i] for i in order[n_runs:]]
        errors += [abs(simulated.true_s(r) / p - 1) for r, p in zip(rest, fit.predict(rest)[0], strict=True)]
    return statistics.median(errors)


@pytest.mark.parametrize(("n_runs", "most"), [(0, 0.25), (4, 0.08), (8, 0.05), (16, 0.03)])
@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_speeds_of_placements_not_run(n_runs: int, most: float, noise: float) -> None:
    """The median error falls below 25 % without a run, 8 % after 4, 5 % after 8 and 3 % after 16."""
    assert median_error(n_runs, noise, range(100, 115)) <= most


def test_speeds_of_a_dense_model() -> None:
    """A model without experts is learned as well."""
    assert median_error(8, 0.01, range(10), DENSE) <= 0.05


def test_coefficients_are_recovered_within_their_uncertainty(decode: tuple[TimingRow, ...]) -> None:
    """Of the identified coefficients, nine in ten lie within 2.5 standard deviations of the truth."""
    inside = []
    for seed in range(12):
        simulated = Simulated(seed, misfit=0.01)
        fit = learn(simulated, simulated.runs(decode[:16]))
        for each in fit.parameters:
            if each.name not in fit.unidentified:
                off = fit.values[each.name] - simulated.machine.coefficients[each.name].value
                inside.append(abs(off) <= 2.5 * fit.uncertainties[each.name])
    assert np.mean(inside) >= 0.9


@pytest.mark.parametrize(("n_runs", "most"), [(4, 0.20), (8, 0.18), (16, 0.15)])
def test_main_coefficients_are_recovered(n_runs: int, most: float) -> None:
    """The rates and times that most placements share come within 20 % after 4 runs, 18 after 8, 15 after 16.

    They are less certain than speeds: what one takes too much another takes too little.
    """
    rows, off = pool()[0], []
    for seed in range(200, 215):
        simulated = Simulated(seed, noise=0.02)
        order = random.Random(seed).sample(rows, n_runs)
        fit = learn(simulated, simulated.runs(order))
        for each in fit.parameters:
            if each.base in MAIN and each.name not in fit.unidentified:
                true = simulated.machine.coefficients[each.name].value
                off.append(abs(math.log(fit.values[each.name] / true)))
    assert statistics.median(off) <= most


def test_without_runs_every_coefficient_keeps_its_prior() -> None:
    """No rows: all priors, all unidentified."""
    fit = calibrate(bare_machine(), [])
    assert fit.unidentified == tuple(each.name for each in fit.parameters)
    assert fit.values == pytest.approx({each.name: each.prior for each in fit.parameters})


def test_what_no_run_touches_is_unidentified_and_at_its_prior(decode: tuple[TimingRow, ...]) -> None:
    """Runs on CUDA0 alone say nothing about a boundary between GPUs."""
    mine = [row for row in decode if not any("boundary_us" in dict(term.powers) for term in row.terms)]
    fit = learn(Simulated(1), Simulated(1).runs(mine[:8]))
    assert "boundary_us" in fit.unidentified
    assert fit.values["boundary_us"] == pytest.approx(45.0)


def test_a_fit_does_not_depend_on_what_was_fitted_before(decode: tuple[TimingRow, ...]) -> None:
    """The same runs give the same values on the machine that they have already changed."""
    from placement.measure.calibrate.applied import apply_fit

    rows = Simulated(3).runs(decode[:8])
    first = calibrate(bare_machine(), rows, with_errors=False)
    changed, _ = apply_fit(bare_machine(), [first], (), "2026-01-01")
    second = calibrate(changed, rows, with_errors=False)
    assert second.values == pytest.approx(first.values, rel=1e-6)


def test_no_coefficient_is_negative(decode: tuple[TimingRow, ...]) -> None:
    """Times that are too short for the model push nothing below zero."""
    rows = [replace(row, measured_s=predict_s(row, bare_machine()) * 0.3) for row in decode[:10]]
    assert min(calibrate(bare_machine(), rows, with_errors=False).values.values()) >= 0.0


@pytest.mark.parametrize("seed", range(4))
def test_a_throttled_run_is_flagged_and_does_not_count(decode: tuple[TimingRow, ...], seed: int) -> None:
    """Of ten runs one is 45 % slow: it is named, and the fit is what the nine others say."""
    simulated = Simulated(seed)
    rows = simulated.runs(decode[:9])
    hot = simulated.run(decode[9], throttle=1.45)
    fit = learn(simulated, [*rows, hot])
    assert [each.run for each in fit.outliers] == [hot.run]
    assert fit.values == pytest.approx(learn(simulated, rows).values, rel=1e-3)


def test_a_run_that_says_itself_that_it_was_disturbed_is_not_fitted(decode: tuple[TimingRow, ...]) -> None:
    """A run that swapped is listed with its reason, however well it fits."""
    simulated = Simulated(2)
    rows = simulated.runs(decode[:6])
    swapped = replace(simulated.run(decode[6]), doubt="the host swapped 900 MiB meanwhile")
    fit = learn(simulated, [*rows, swapped])
    assert [(each.run, each.reason) for each in fit.outliers] == [(swapped.run, swapped.doubt)]
    assert fit.n_rows == 6


def test_calm_runs_are_not_flagged(decode: tuple[TimingRow, ...]) -> None:
    """Noise alone makes no outlier: at most one in twenty machines of eight runs."""
    flagged = [
        bool(learn(s, s.runs(decode[8:16])).outliers)
        for s in (Simulated(seed, noise=0.03) for seed in range(20))
    ]
    assert sum(flagged) <= 1


def test_every_run_has_an_error_before_and_without_it(decode: tuple[TimingRow, ...]) -> None:
    """The leave-one-out error of a run is what a fit to all others predicts of it."""
    simulated = Simulated(4)
    rows = simulated.runs(decode[:6])
    fit = learn(simulated, rows, with_errors=True)
    others = learn(simulated, rows[1:])
    expected = others.predict(rows[:1])[0][0] / (rows[0].measured_s or math.nan) - 1
    assert [each.run for each in fit.errors] == [row.run for row in rows]
    assert fit.errors[0].after == pytest.approx(expected, abs=2e-3)
    assert fit.errors[0].before == pytest.approx(predict_s(rows[0], bare_machine()) / rows[0].measured_s - 1)


def test_prompts_are_learned_apart() -> None:
    """Prompt rows do not move decode's coefficients; their own error falls."""
    decode_rows, prompt_rows = pool()
    simulated = Simulated(7)
    runs = simulated.runs(decode_rows[:10]) + simulated.runs(prompt_rows[:10])
    decode_fit = calibrate(bare_machine(), runs, DECODE, with_errors=False)
    alone = calibrate(bare_machine(), [row for row in runs if row.kind == DECODE], DECODE, with_errors=False)
    prompt_fit = calibrate(bare_machine(), runs, PROMPT, decode_fit.values, with_errors=False)
    rest = prompt_rows[10:]
    errors = [
        abs(simulated.true_s(r) / p - 1) for r, p in zip(rest, prompt_fit.predict(rest)[0], strict=True)
    ]
    assert decode_fit.values == alone.values
    assert statistics.median(errors) <= 0.08


@pytest.mark.parametrize("n_calm", [0, 2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_at_a_fifth_of_its_speed_is_never_fitted(
    decode: tuple[TimingRow, ...], n_calm: int, seed: int
) -> None:
    """A machine that swapped through a whole run without saying so: alone, one of three, of four, of eight."""
    simulated = Simulated(seed)
    rows = simulated.runs(decode[:n_calm])
    fit = learn(simulated, [*rows, simulated.run(decode[9], throttle=5.0)])
    assert [each.run for each in fit.outliers] == [decode[9].run]


def test_two_slow_runs_that_agree_are_believed(decode: tuple[TimingRow, ...]) -> None:
    """A machine may really be three times slower than anybody believes."""
    slow = replace(bare_machine(), coefficients={"cpu_read_efficiency": Coefficient(0.1, "fraction")})
    host = on_the_host(decode)
    rows = [replace(row, measured_s=predict_s(row, slow), noise=0.01) for row in host[:5]]
    fit = learn(Simulated(1), rows)
    assert fit.outliers == ()
    assert fit.predict(host[5:8])[0] == pytest.approx([predict_s(row, slow) for row in host[5:8]], rel=0.1)


def on_the_host(rows: tuple[TimingRow, ...]) -> list[TimingRow]:
    """Rows whose time the host's bandwidth matters to."""
    return [row for row in rows if any("cpu_read_efficiency" in dict(term.powers) for term in row.terms)]


@pytest.mark.parametrize("noise", [0.04, 0.08])
def test_runs_that_are_noisier_than_they_say_are_not_flagged(
    decode: tuple[TimingRow, ...], noise: float
) -> None:
    """Where all runs lie far from each other none is an outlier: at most one run in forty is taken for one."""
    flagged = 0
    for seed in range(20):
        simulated = Simulated(seed, noise=noise)
        rows = [replace(row, noise=0.005) for row in simulated.runs(decode[8:18])]
        flagged += len(learn(simulated, rows).outliers)
    assert flagged / 200 <= 1 / 40


@pytest.mark.parametrize("kind", ["three cards", "workers", "no card"])
def test_other_machines_are_learned_as_well(kind: str) -> None:
    """Three unequal cards, workers, and a host alone: half of the error at most is left after eight runs."""
    rows, before, after = pool(kind=kind)[0], [], []
    for seed in range(6):
        simulated = Simulated(seed, base=MACHINES[kind]())
        priors = calibrate(MACHINES[kind](), [], with_errors=False)
        fit = calibrate(MACHINES[kind](), simulated.runs(rows[:8]), with_errors=False)
        for errors, each in ((before, priors), (after, fit)):
            seconds = each.predict(rows[8:])[0]
            errors += [abs(simulated.true_s(r) / p - 1) for r, p in zip(rows[8:], seconds, strict=True)]
    assert statistics.median(after) <= min(0.05, statistics.median(before) / 2)


def test_two_quantisation_families_are_told_apart() -> None:
    """With i-quants and floats beside other quants, sixteen runs tell that i-quants are read at 70 % of the speed."""
    rows = pool("qwen3-30b-a3b-q4+")[0]
    truth = Coefficient(0.7, "fraction")
    slow = replace(bare_machine(), coefficients={"iq_read_share": truth})
    runs = [replace(row, measured_s=predict_s(row, slow), noise=0.01) for row in rows[:16]]
    fit = calibrate(bare_machine(), runs, with_errors=False)
    assert fit.values["iq_read_share.CPU"] == pytest.approx(
        0.7, abs=2 * fit.uncertainties["iq_read_share.CPU"]
    )
    assert fit.values["iq_read_share.CPU"] < 0.85 < fit.values["float_read_share.CPU"]


def test_the_hosts_cache_has_a_rate_of_its_own() -> None:
    """Placements on the CPU that slow down with depth teach it; weights there keep their rate."""
    rows = pool(kind="no card")[0]
    slow = replace(no_card(), coefficients={"kv_read_efficiency.CPU": Coefficient(0.05, "fraction")})
    runs = [replace(row, measured_s=predict_s(row, slow), noise=0.01) for row in rows[:8]]
    fit = calibrate(no_card(), runs, with_errors=False)
    assert fit.values["kv_read_efficiency.CPU"] == pytest.approx(0.05, rel=0.1)
    assert fit.values["cpu_read_efficiency"] == pytest.approx(0.55, rel=0.15)


def test_what_a_probe_found_to_be_nothing_can_grow_again(decode: tuple[TimingRow, ...]) -> None:
    """A fixed time that was detected as zero is no logarithm: runs may still find 120 us."""
    nothing = Coefficient(3e-16, "us", "detected", "2026-01-01", 4, 60.0)
    machine = replace(bare_machine(), coefficients={"token_us": nothing})
    true = replace(machine, coefficients={"token_us": Coefficient(120.0, "us")})
    rows = [replace(row, measured_s=predict_s(row, true), noise=0.005) for row in decode[:12]]
    fit = calibrate(machine, rows, with_errors=False)
    assert fit.values["token_us"] == pytest.approx(120.0, abs=2.5 * fit.uncertainties["token_us"])
    assert 0 < fit.uncertainties["token_us"] < 100


@pytest.mark.parametrize("name", ["split_us", "boundary_us", "layer_us.CUDA0"])
def test_a_file_may_say_that_a_time_is_nothing(decode: tuple[TimingRow, ...], name: str) -> None:
    """A prior of zero is fitted in its unit."""
    machine = replace(bare_machine(), coefficients={name: Coefficient(0.0, "us")})
    fit = calibrate(machine, Simulated(1).runs(decode[:8]), with_errors=False)
    assert all(math.isfinite(each) and each >= 0 for each in fit.values.values())


def test_an_overlap_is_never_more_than_all() -> None:
    """Pipelined prompts that are faster than any overlap explains: the machine file still takes what is learned."""
    stages = [{term.stage for term in row.terms if term.stage} for row in pool()[1]]
    both = [row for row, result in zip(pool()[1], stages, strict=True) if len(result) > 1][:6]
    rows = [replace(row, n_copies=4, n_ubatches=8) for row in both]
    fast = [replace(row, measured_s=0.4 * predict_s(row, bare_machine()), noise=0.01) for row in rows]
    fit = calibrate(bare_machine(), fast, PROMPT, with_errors=True)
    assert fit.values["pipeline_overlap"] <= 1.0
    assert (fit.predict(rows)[0] > 0).all()
