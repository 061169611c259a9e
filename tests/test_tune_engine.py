"""A whole tuning with the real llama-server on two workers."""

from __future__ import annotations

import pytest
from verify_support import Lines, cluster, quick, write_model

from placement.engine.find import Engine
from placement.engine.rpc import rpc_workers
from placement.inputs.model_files.files import read_model
from placement.measure.tune.lines import Tuned
from placement.measure.tune.loop import tune
from placement.measure.verify.candidates import FIT
from placement.solve.request import Request
from placement.solve.run import NO_ENGINE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tuning(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, list[str]]:
    """A tuning of a small mixture, and what it said."""
    folder, said = tmp_path_factory.mktemp("tune"), list[str]()
    file = write_model(folder / "moe.gguf", is_moe=True)
    request = Request(
        ctx_tokens=1024, ubatch_tokens=512, prompt_tokens=200, generate_tokens=50, time_limit_s=3.0
    )
    with rpc_workers(engine, 2) as workers:
        machine = cluster(*(each.endpoint for each in workers), usable_mib=11)
        tuned = tune(
            read_model(file), machine, file, engine, request, NO_ENGINE, folder / "solutions",
            quick(folder, budget_s=90), Lines(), said.append,
        )  # fmt: skip
    return tuned, said


def test_the_choice_is_not_slower_than_fit(tuning: tuple[Tuned, list[str]]) -> None:
    """What is recommended ran beside llama.cpp's own --fit, and measured at least as fast."""
    report = tuning[0].report
    assert report is not None and report.verdict.recommended is not None
    turns = [each.turn_s for each in report.verdict.results if each.role == FIT and each.turn_s]
    assert turns and (report.verdict.recommended.turn_s or 0) <= min(turns)


def test_every_step_says_what_was_predicted_and_measured(tuning: tuple[Tuned, list[str]]) -> None:
    """One line a run, with its error; something is learned."""
    tuned, said = tuning
    steps = [line for line in said if line.startswith("place: step ")]
    assert len(steps) == len(tuned.lines) >= 2
    assert all("predicted" in line and "error" in line for line in steps)
    assert [each for each in tuned.changes if each.is_identified]


def test_the_machine_was_probed_first(tuning: tuple[Tuned, list[str]]) -> None:
    """Nothing was known of its speeds: llama-bench told some before any placement ran."""
    tuned, said = tuning
    assert "is known: probing it" in said[0]
    assert [each for each in tuned.machine.history if each.coefficient.source == "detected"]
