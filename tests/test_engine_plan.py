"""The real llama.cpp plans real models without their weights, and our arithmetic says the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden_sample import GOLDEN
from golden_sample import model as golden_model

from placement.engine.cache import PlanCache
from placement.engine.find import Engine, describe_engine, list_devices
from placement.engine.plan import fit_arguments, model_path, plan, plan_many
from placement.engine.rpc import RpcWorker, rpc_workers
from placement.errors import EngineFailed
from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model
from placement.inputs.model_files.files import resolve_model
from placement.llamacpp.arguments import parse
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.resolve import resolve
from placement.llamacpp.memory import static_memory
from placement.units import MIB

pytestmark = pytest.mark.engine

Workers = tuple[RpcWorker, ...]
EXPERTS = r"\.ffn_(up|gate|down)_exps"
CASES = [
    ("qwen3-30b-a3b-q4", "-c 8192 -ngl 99 -ts 24,25"),
    ("qwen3-30b-a3b-q4", rf"-c 8192 -ngl 99 -ts 24,25 -ot blk\.4[0-7]{EXPERTS}=CPU"),
    ("qwen3-30b-a3b-q4", rf"-c 32768 -np 2 -ngl 99 -ts 10,39 -ot blk\.(5|6|20){EXPERTS}=BUFFER1"),
    ("qwen3-30b-a3b-q4", "-c 16384 -ngl 30 -ts 1,1"),
    ("qwen3-coder-q5", rf"-c 131072 -ctk q8_0 -ctv q8_0 -ngl 99 -ts 18,31 -ot blk\.1[0-7]{EXPERTS}=CPU"),
    ("qwen3-coder-q5", r"-c 4096 -ngl 99 -ts 31,18 -ot blk\.(40|41)\.ffn_down_exps=CPU"),
    ("glm-flash-q4", "-c 65536 -ngl 99 -ts 30,18"),
    ("glm-flash", rf"-c 131072 -ngl 99 -ts 20,28 -ot blk\.(3|4|5|30){EXPERTS}=CPU"),
    ("gpt-oss-120b", rf"-c 131072 -ngl 99 -ts 20,17 -ot blk\.3[0-5]{EXPERTS}=CPU"),
    ("gpt-oss-120b", "-c 8192 -ub 2048 -ngl 99 -ts 1,2 -ncmoe 20"),
    ("llama-3.3-70b-q4", "-c 8192 -ctk q8_0 -ctv q8_0 -ngl 99 -ts 41,40"),
    ("llama-3.3-70b-q4", r"-c 8192 -ngl 60 -ts 3,2"),
    ("gemma-3-27b-q4", "-c 32768 -ngl 99 -ts 32,31"),
    ("gemma-3-27b-q4", r"-c 8192 -ngl 99 -ts 40,23 -ot blk\.(5[6-9])\.ffn_(up|gate|down)=CPU"),
]


@pytest.fixture(scope="module")
def workers(engine: Engine) -> Iterator[Workers]:
    """Two local workers, ended with the module."""
    with rpc_workers(engine, 2) as running:
        yield running


@pytest.fixture(scope="module")
def cache(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> PlanCache:
    """Each placement is planned once for all the tests that look at it."""
    return PlanCache(engine, tmp_path_factory.mktemp("plans"))


def rpc_of(workers: Workers) -> list[str]:
    return ["--rpc", ",".join(worker.endpoint for worker in workers)]


def any_model(name: str) -> Model:
    return golden_model(name) if (GOLDEN / "models" / f"{name}.json").exists() else resolve_model(name)


def machine_of(workers: Workers) -> Machine:
    devices = tuple(
        Device(f"RPC{i}", 200_000, 200_000, 0, 50, 10, "CPU", address=worker.endpoint)
        for i, worker in enumerate(workers)
    )
    return Machine("two-workers", devices, Cpu(200_000, 50, 2))


def arguments_of(workers: Workers, text: str) -> list[str]:
    return [*rpc_of(workers), "-fa", "on", *text.replace("BUFFER1", f"RPC0[{workers[1].endpoint}]").split()]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_estimate_equals_plan(
    engine: Engine, workers: Workers, cache: PlanCache, name: str, text: str
) -> None:
    """Weights and context of every device are those of the engine's own plan, to the MiB it prints."""
    model = any_model(name)
    arguments = arguments_of(workers, text)
    planned = plan(engine, model, arguments, cache=cache).devices
    assignment = resolve(model, machine_of(workers), parse(arguments), "llama-fit-params")
    estimated = static_memory(model, machine_of(workers), assignment)
    for device, memory in planned.items():
        n_parts = 2 if device == "Host" else 1  # the engine rounds plain and repacked weights down apart
        difference = estimated[device].weights_bytes / MIB - memory.weights_mib
        assert 0 <= difference < n_parts, (device, difference)
        assert estimated[device].context_bytes // MIB == memory.context_mib


@pytest.mark.parametrize(("name", "text"), CASES)
def test_splits_equal_plan(engine: Engine, workers: Workers, cache: PlanCache, name: str, text: str) -> None:
    """Prompt and decode splits, graph nodes and pipeline copies are those of the engine's own plan."""
    model, machine = resolve_model(name), machine_of(workers)
    arguments = arguments_of(workers, text)
    planned = plan(engine, model, arguments, cache=cache)
    assignment = resolve(model, machine, parse(arguments), "llama-fit-params")
    ours = plan_compute(model, machine, assignment, "llama-fit-params")
    assert (ours.splits_prompt, ours.splits_decode) == (planned.splits_prompt, planned.splits_decode)
    assert (ours.n_nodes_prompt, ours.n_nodes_decode) == (planned.nodes_prompt, planned.nodes_decode)
    assert ours.n_copies == planned.n_copies


@pytest.mark.parametrize(("name", "text"), CASES)
def test_compute_buffers_equal_plan(
    engine: Engine, workers: Workers, cache: PlanCache, name: str, text: str
) -> None:
    """The compute buffer of every device is the one the engine reserves, to the MiB it prints."""
    model, machine = resolve_model(name), machine_of(workers)
    arguments = arguments_of(workers, text)
    assignment = resolve(model, machine, parse(arguments), "llama-fit-params")
    ours = plan_compute(model, machine, assignment, "llama-fit-params").compute_bytes
    planned = plan(engine, model, arguments, cache=cache).devices
    assert {name: memory.compute_mib for name, memory in planned.items()} == {
        name: ours[name] // MIB for name in planned
    }


@pytest.mark.parametrize(
    "text", ["-c 4096 -ngl 99 -ts 1,1", "-c 8192 -np 2 -ngl 99 -ts 1,2", "-c 512 -ngl 1"]
)
@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDEN / "models").glob("*.json")))
def test_architectures(engine: Engine, workers: Workers, cache: PlanCache, name: str, text: str) -> None:
    """The same holds for tiny models of other architectures: hybrid, sparse attention, several caches."""
    test_estimate_equals_plan(engine, workers, cache, name, text)


def test_server_sizes_logits_for_its_slots(engine: Engine, workers: Workers) -> None:
    """llama-server takes the same weights and context as llama-fit-params says, and a smaller buffer."""
    model = resolve_model("qwen3-30b-a3b-q4")
    arguments = arguments_of(workers, "-c 8192 -np 1 -ngl 99 -ts 24,25")
    whole = plan(engine, model, arguments)
    served = plan(engine, model, arguments, program="llama-server")
    assert (whole.program, served.program) == ("llama-fit-params", "llama-server")
    for name, memory in whole.devices.items():
        ours = served.devices[name]
        assert (memory.weights_mib, memory.context_mib) == (ours.weights_mib, ours.context_mib)
    logits_mib = 4 * 151936 * 511 / MIB
    assert whole.devices["RPC1"].compute_mib > served.devices["RPC1"].compute_mib > logits_mib / 8
    assert (whole.splits_decode, whole.nodes_decode) == (served.splits_decode, served.nodes_decode)


def test_server_is_ended_before_it_loads(engine: Engine, workers: Workers) -> None:
    """Planning with llama-server takes under two seconds for a model of 61 GiB that is not on this disk."""
    arguments = arguments_of(workers, "-c 8192 -np 1 -ngl 99 -ts 20,17")
    assert plan(engine, resolve_model("gpt-oss-120b"), arguments, program="llama-server").wall_s < 2


def test_profile_arguments_are_accepted(engine: Engine, workers: Workers) -> None:
    """The server's own arguments (--jinja, samplers) may stand among those to plan."""
    extra = ["--jinja", "--temp", "1.0", "--top-p", "0.95", "--min-p", "0.01"]
    arguments = [*arguments_of(workers, "-c 4096 -ngl 99 -ts 24,24"), *extra]
    assert plan(engine, resolve_model("glm-flash-q4"), arguments, program="llama-server").splits_decode == 3


def test_fit_options_are_left_out(engine: Engine, workers: Workers) -> None:
    """`-fit off` among the arguments, which every solution carries, changes nothing."""
    model = resolve_model("glm-flash-q4")
    arguments = arguments_of(workers, "-c 4096 -np 1 -ngl 99 -ts 24,24")
    for program in ("llama-fit-params", "llama-server"):
        plain = plan(engine, model, arguments, program=program)
        assert plan(engine, model, [*arguments, "-fit", "off"], program=program).devices == plain.devices


def test_plans_without_devices(engine: Engine) -> None:
    """Without any device everything is on the host; several are planned side by side, in order."""
    sizes = [4096, 8192, 16384]
    arguments = [["-c", str(size), "-fa", "on"] for size in sizes]
    plans = plan_many(engine, resolve_model("llama-3.3-70b-q4"), arguments, n_side_by_side=2)
    assert [set(each.devices) for each in plans] == [{"Host"}] * 3
    assert [each.kv_mib for each in plans] == [(size * 80 * 2 * 1024 * 2 / MIB,) for size in sizes]


def test_many_on_workers(engine: Engine, workers: Workers) -> None:
    """Plans on the same workers, which serve one client at a time, are made one by one and all succeed."""
    splits = [f"{n},{49 - n}" for n in (5, 15, 25, 35, 44)]
    arguments = [arguments_of(workers, f"-c 4096 -ngl 99 -ts {split}") for split in splits]
    plans = plan_many(engine, resolve_model("qwen3-30b-a3b-q4"), arguments, n_side_by_side=4)
    weights = [each.devices["RPC0"].weights_mib for each in plans]
    assert weights == sorted(set(weights))


def test_remembered(engine: Engine, workers: Workers, tmp_path: Path) -> None:
    """The second plan of the same arguments comes from the cache and is the same."""
    cache = PlanCache(engine, tmp_path)
    model = resolve_model("glm-flash-q4")
    arguments = arguments_of(workers, "-c 4096 -ngl 99 -ts 24,24")
    first, second = (plan(engine, model, arguments, cache=cache) for _ in range(2))
    assert (first.is_cached, second.is_cached) == (False, True)
    assert first.devices == second.devices


def test_two_devices_behind_one_worker(engine: Engine) -> None:
    """One worker may bring several devices, each planned for itself."""
    with rpc_workers(engine, 1, devices_each=2) as workers:
        planned = plan(
            engine,
            resolve_model("qwen3-30b-a3b-q4"),
            ["-c", "4096", "-fa", "on", "-ngl", "99", "-ts", "1,1", *rpc_of(workers)],
        )
    assert set(planned.devices) == {"RPC0", "RPC1", "Host"}


def test_workers_end(engine: Engine) -> None:
    """Workers are listed while their context lasts, and have ended after it."""
    with rpc_workers(engine, 2) as workers:
        names = [device.name for device in list_devices(engine, [each.endpoint for each in workers])]
        assert names[:2] == ["RPC0", "RPC1"]
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)


def test_dead_worker(engine: Engine) -> None:
    """A worker that is gone is one clear error."""
    with rpc_workers(engine, 1) as workers:
        rpc = rpc_of(workers)
    with pytest.raises(EngineFailed, match=r"(?i)rpc|connect"):
        plan(engine, resolve_model("glm-flash-q4"), ["-c", "4096", *rpc], timeout_s=30)


def test_configuration_does_not_leak(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither ~/.config/llama.cpp/config.ini nor LLAMA_ARG_* change a plan."""
    model, arguments = resolve_model("qwen3-30b-a3b-q4"), ["-c", "4096", "-fa", "on"]
    before = plan(engine, model, arguments)
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "config.ini").write_text("[*]\nctk = q8_0\nctv = q8_0\nubatch-size = 2048\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_ARG_CACHE_TYPE_K", "q4_0")
    monkeypatch.setenv("LLAMA_ARG_UBATCH", "64")
    after = plan(engine, model, arguments)
    assert (before.devices, before.kv_mib) == (after.devices, after.kv_mib)
    assert not [name for name in after.config_files if not name.startswith("/etc/")]


def test_unknown_flag(engine: Engine) -> None:
    """A flag that the real engine does not know is named in one line."""
    for program in ("llama-fit-params", "llama-server"):
        with pytest.raises(EngineFailed, match="invalid argument: --no-such-flag"):
            plan(engine, resolve_model("glm-flash-q4"), ["--no-such-flag"], program=program)


def test_abort_of_the_real_engine(engine: Engine) -> None:
    """Settings that make the real engine abort are one line with its reason."""
    arguments = ["-c", "4096", "-fa", "off", "-ctv", "q8_0"]
    for program in ("llama-fit-params", "llama-server"):
        with pytest.raises(EngineFailed, match="quantized V cache"):
            plan(engine, resolve_model("qwen3-30b-a3b-q4"), arguments, program=program)


def test_own_fit(engine: Engine, workers: Workers) -> None:
    """llama.cpp's own --fit gives arguments that can be planned."""
    model = resolve_model("qwen3-30b-a3b-q4")
    free = min(d.free_mib for d in list_devices(engine, [w.endpoint for w in workers]))
    target = str(int(free) - 4000)  # leaves it 4,000 MiB on each
    arguments = ["-c", "4096", "-fa", "on", *rpc_of(workers)]
    fitted = fit_arguments(engine, model, [*arguments, "-fitt", target])
    assert "-ngl" in fitted
    assert plan(engine, model, [*rpc_of(workers), *fitted, "-fa", "on"]).devices["RPC0"].total_mib < 4100


def test_description(engine: Engine) -> None:
    """The engine of the tests has every flag that planning wants."""
    info = describe_engine(engine)
    assert info.version
    assert "llama-fit-params" not in info.lacks
    assert "CPU" in info.backends


def test_own_file_is_used(tmp_path: Path) -> None:
    """A model whose GGUF is on disk is planned from it; a description from a file that goes away again."""
    model = resolve_model("glm-flash-q4")
    with model_path(model) as header:
        assert header.stat().st_size > 16 << 30
        assert header.stat().st_blocks * 512 < 4 << 20
        loaded = resolve_model(os.fspath(header))
        with model_path(loaded) as own:
            assert own == header
    assert not header.exists()
