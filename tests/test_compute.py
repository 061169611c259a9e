from __future__ import annotations

import dataclasses
import gc
import json

import golden_sample
import pytest
from golden_sample import GOLDEN, Row, assignment, machine, model
from test_architecture import tiny

from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model, Tensor
from placement.inputs.problem import CPU, Assignment, Settings
from placement.llamacpp import compute
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.plan import ComputePlan
from placement.units import MIB

BIG = "llama-3.3-70b-q4"
MORE_ROWS: tuple[Row, ...] = tuple(
    json.loads(line) for line in (GOLDEN / "compute.jsonl").read_text(encoding="utf-8").splitlines()
)
DEVICES = (Device("CUDA0", 24576, 24000, 480, 1000, 25), Device("CUDA1", 16384, 12800, 480, 900, 25))
TWO = Machine("two", DEVICES, Cpu(65536, 50, 16))
NAMES = ("CUDA0", "CUDA1")


def plan(row: Row) -> ComputePlan:
    """The plan of a recorded row."""
    return plan_compute(model(row["model"]), machine(row["machine"]), assignment(row), "llama-fit-params")


def whole(name: str, *homes: str, **settings: object) -> Assignment:
    """A shipped model on two cards, layers where `homes` says, by runs of equal length."""
    n_homes = int(str(model(name).get("block_count"))) + 1
    spread = tuple(homes[i * len(homes) // n_homes] for i in range(n_homes))
    return Assignment(NAMES, spread, settings=dataclasses.replace(Settings(), **settings))  # type: ignore[arg-type]


def deep(shallow: Model, times: int) -> Model:
    """A model whose layers are repeated."""
    name, n_layer = shallow.architecture, int(str(shallow.get("block_count")))
    metadata = dict(shallow.metadata)
    for key, value in shallow.metadata.items():
        if key.startswith(f"{name}.") and isinstance(value, tuple) and len(value) == n_layer:
            metadata[key] = value * times
    metadata[f"{name}.block_count"] = n_layer * times
    tensors: list[Tensor] = []
    for tensor in shallow.tensors:
        if not tensor.name.startswith("blk."):
            tensors.append(tensor)
            continue
        _, number, rest = tensor.name.split(".", 2)
        numbers = (int(number) + n_layer * i for i in range(times))
        tensors += [dataclasses.replace(tensor, name=f"blk.{il}.{rest}") for il in numbers]
    return Model(shallow.name, metadata, dict(shallow.metadata_types), tuple(tensors))


@pytest.mark.parametrize(
    "row", [*golden_sample.ROWS, *MORE_ROWS], ids=lambda row: f"{row['model']}-{row['kind']}"
)
def test_recorded_plan(row: Row) -> None:
    """Splits, pipeline copies and every compute buffer are those that the engine printed."""
    ours = plan(row)
    assert {"pp": ours.splits_prompt, "tg": ours.splits_decode} == row["splits"]
    assert ours.n_copies == row["sched_copies"]
    recorded = {name: device["compute"] for name, device in row["devices"].items()}
    assert {name: ours.compute_bytes[name] // MIB for name in recorded} == recorded
    assert ours.is_exact


def test_repeated_question() -> None:
    """A plan is the same whatever was planned before it with the same model."""
    rows = [row for row in golden_sample.ROWS if row["model"] == golden_sample.ROWS[0]["model"]]
    first = [plan(row) for row in rows]
    assert [plan(row) for row in reversed(rows)] == first[::-1]


@pytest.mark.parametrize("name", ["glm-dsa-moe", "jamba-dense", "mimo2-moe", "qwen3next-moe", "gemma3-dense"])
@pytest.mark.parametrize("homes", [NAMES, (CPU, "CUDA0"), ("CUDA1", "CUDA0", CPU)])
def test_shortened_runs(name: str, homes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving out alike layers changes nothing in the plan of a deep model."""
    many = deep(model(name), 12)
    n_homes = int(str(many.get("block_count"))) + 1
    spread = tuple(homes[i * len(homes) // n_homes] for i in range(n_homes))
    asked = Assignment(NAMES, spread, settings=Settings(ctx_tokens=8192))
    short = plan_compute(many, TWO, asked, "llama-fit-params")
    monkeypatch.setattr(compute, "shorten", lambda keys: (list(range(len(keys))), []))
    assert plan_compute(many, TWO, asked, "llama-fit-params") == short


def test_pipeline_copies() -> None:
    """Four copies with every layer on two cards; one where overrides, the CPU or host caches forbid it."""
    one = model(BIG)
    copies = {
        case: plan_compute(one, TWO, asked, "llama-bench").n_copies
        for case, asked in {
            "plain": whole(BIG, *NAMES),
            "override": whole(BIG, *NAMES, has_overrides=True),
            "host cache": whole(BIG, *NAMES, is_kv_offloaded=False),
            "cpu": whole(BIG, CPU, *NAMES),
        }.items()
    }
    assert copies == {"plain": 4, "override": 1, "host cache": 1, "cpu": 1}


def test_server_logits() -> None:
    """llama-server sizes logits for its slots, llama-bench for a whole ubatch."""
    asked = whole(BIG, "CUDA0", ubatch_tokens=2048)
    server, bench = (
        plan_compute(model(BIG), TWO, asked, program).compute_bytes["CUDA0"]
        for program in ("llama-server", "llama-bench")
    )
    assert server < bench
    assert bench > 2048 * 128256 * 4


def test_ubatch_grows_buffers() -> None:
    """Twice the ubatch takes about twice the buffer where flash attention needs no scratch."""
    sizes = [
        plan_compute(model(BIG), TWO, whole(BIG, "CUDA0", ubatch_tokens=n), "llama-bench").compute_bytes[
            "CUDA0"
        ]
        for n in (512, 1024)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.1)


def test_decode_crosses_once_per_boundary() -> None:
    """Decode has a split for the embedding on the CPU and one per card."""
    ours = plan_compute(model(BIG), TWO, whole(BIG, *NAMES), "llama-server")
    assert (ours.splits_decode, ours.splits_prompt) == (3, 3)


def test_remote_worker_sizes() -> None:
    """A worker known as a CPU needs no f16 copies of a quantised cache; any other is taken for a GPU."""
    asked = Assignment(("RPC0",), ("RPC0",) * 81, settings=Settings(kv_type_k="q8_0", kv_type_v="q8_0"))
    sizes = []
    for description in ("CPU", ""):
        worker = Device("RPC0", 99999, 99999, 0, 50, 1, description, address="host:1")
        remote = Machine("remote", (worker,), Cpu(65536, 50, 16))
        sizes.append(plan_compute(model(BIG), remote, asked, "llama-server").compute_bytes["RPC0"])
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("shapes", [{}, {"blk.0.odd.weight": (256, 256)}, {"output.weight": (256, 1000)}])
def test_unknown_architecture(shapes: dict[str, tuple[int, ...]]) -> None:
    """An architecture without a row is estimated and says so."""
    odd = tiny("never-heard-of", shapes)
    ours = plan_compute(
        odd, TWO, Assignment(NAMES, ("CUDA0", "CUDA0", "CUDA1", CPU, "CUDA1")), "llama-server"
    )
    assert not ours.is_exact
    assert ours.notes
    assert set(ours.compute_bytes) == {*NAMES, "Host"}
    assert ours.splits_decode > 1


@pytest.mark.parametrize(
    ("shapes", "keys"),
    [
        ({"blk.0.ssm_in.weight": (256, 512)}, {}),
        ({}, {"attention__head_count": 0}),
        ({}, {"expert_count": 8}),
        ({"token_embd_norm.weight": (256,)}, {"block_count": 0}),
    ],
    ids=[
        "recurrent layers",
        "no head size",
        "no number of used experts",
        "no layers",
    ],
)
def test_what_a_header_does_not_say_is_estimated(
    shapes: dict[str, tuple[int, ...]], keys: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that lacks what its graph needs is no bug, and its graph is not tried: nothing there would end."""
    monkeypatch.setattr(compute._Planner, "_simulated", lambda _self: pytest.fail("is simulated"))
    odd = tiny("never-heard-of", shapes, **keys)
    asked = Assignment(NAMES, ("CUDA0", "CUDA0", "CUDA1", CPU, "CUDA1"))
    assert not plan_compute(odd, TWO, asked, "llama-server").is_exact


@pytest.mark.parametrize("error", [KeyError, IndexError, ZeroDivisionError, TypeError])
@pytest.mark.parametrize("architecture", ["llama", "never-heard-of"])
def test_a_bug_of_ours_is_no_estimate(
    architecture: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a graph that nobody has described is estimated; all else shows."""

    def fail(_self: object) -> ComputePlan:
        raise error

    monkeypatch.setattr(compute._Planner, "_simulated", fail)
    asked = Assignment(NAMES, ("CUDA0", "CUDA0", "CUDA1", CPU, "CUDA1"))
    with pytest.raises(error):
        plan_compute(tiny(architecture), TWO, asked, "llama-server")


def test_planning_leaves_the_garbage_collector_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller's process stays as it was, while a plan is made too."""
    for name in ("disable", "enable", "freeze", "set_threshold"):
        monkeypatch.setattr(gc, name, lambda *_: pytest.fail("the collector is changed"))
    plan(golden_sample.ROWS[0])
    assert gc.isenabled()
