"""Assignments become engine arguments and come back unchanged; resolved arguments follow the engine's rules."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.engine.find import Engine
from placement.engine.plan import model_path
from placement.engine.rpc import rpc_workers
from placement.engine.run import run
from placement.errors import InputError
from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model, Tensor
from placement.inputs.model_files.files import resolve_model
from placement.inputs.problem import CPU, Assignment, Settings
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.arguments import parse
from placement.llamacpp.emit.arguments import emit_arguments, shell_command
from placement.llamacpp.emit.regex import compile_pattern, layer_ranges, patterns_for
from placement.llamacpp.emit.resolve import resolve


def card(name: str, usable_mib: float = 20000, address: str | None = None) -> Device:
    return Device(name, 24576, usable_mib, 480, 1000, 25, address=address)


def machine(*devices: Device) -> Machine:
    return Machine("test", devices, Cpu(64000, 50, 16))


TWO = machine(card("CUDA0", 24000), card("CUDA1", 12800))
ONE = machine(card("CUDA0"))
REMOTE = machine(
    card("CUDA0"), card("RPC0", address="a:1"), card("RPC1", address="a:1"), card("RPC2", address="b:1")
)
SUFFIXES = (
    "attn_norm.weight",
    "attn_output.weight",
    "attn_q.weight",
    "ffn_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_exps.weight",
    "ffn_up_exps.weight",
    "ffn_down_exps.weight",
    "ffn_down_exps.bias",
    "ffn_gate_shexp.weight",
)


def moe(n_layers: int, is_tied: bool = False) -> Model:
    """A mixture of experts whose first layer is dense, as many are."""
    names = ["token_embd.weight", "output_norm.weight"] + ([] if is_tied else ["output.weight"])
    names += ["blk.0.attn_output.weight", "blk.0.ffn_up.weight"]
    names += [f"blk.{layer}.{suffix}" for layer in range(1, n_layers) for suffix in SUFFIXES]
    metadata = {
        "general.architecture": "qwen3moe",
        "qwen3moe.block_count": n_layers,
        "qwen3moe.context_length": 32768,
    }
    return Model("moe", metadata, {}, tuple(Tensor(name, (64, 64), "F16") for name in names))


def assigned(
    text: str, model: Model | None = None, on: Machine = TWO, program: str = "llama-fit-params"
) -> Assignment:
    return resolve(model or moe(10), on, parse(text), program)


def layer_counts(assignment: Assignment) -> list[int]:
    return [assignment.homes.count(name) for name in (*assignment.devices, CPU)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (range(18, 35), "(1[8-9]|2[0-9]|3[0-4])"),
        ([5], "5"),
        (range(10), "[0-9]"),
        (range(35), "([0-9]|[1-2][0-9]|3[0-4])"),
        ([0, 2, 4, 5, 6], "[024-6]"),
        (range(98, 104), "(9[8-9]|10[0-3])"),
        (range(100, 120), "1[0-1][0-9]"),
        ([100, 101, 115], "1(0[0-1]|15)"),
    ],
)
def test_layer_ranges_are_compact(layers: list[int], expected: str) -> None:
    """Runs of layers become digit classes."""
    assert expected == layer_ranges(set(layers))


@given(st.sets(st.integers(0, 999), min_size=1))
def test_layer_ranges_match_exactly(layers: set[int]) -> None:
    """The pattern of a set of numbers fully matches those numbers and no other."""
    pattern = re.compile(layer_ranges(layers))
    assert layers == {number for number in range(1200) if pattern.fullmatch(str(number))}


@given(st.sets(st.integers(0, 999), min_size=1))
def test_layer_ranges_have_no_separator(layers: set[int]) -> None:
    """A comma or equals sign would end the pattern in `-ot`."""
    assert not set(",=") & set(layer_ranges(layers))


@given(st.sets(st.sampled_from([tensor.name for tensor in moe(25).tensors]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_patterns_match_exactly_the_tensors_meant(meant: set[str]) -> None:
    """Any set of tensors, however ragged, is matched by its patterns and nothing else is."""
    names = [tensor.name for tensor in moe(25).tensors]
    patterns = [compile_pattern(pattern) for pattern in patterns_for(meant, names)]
    assert meant == {name for name in names if any(pattern.search(name) for pattern in patterns)}


def test_experts_of_a_run_of_layers_are_one_pattern() -> None:
    """Tensors that move in the same layers share a pattern."""
    meant = {f"blk.{i}.ffn_{part}_exps.weight" for i in range(18, 35) for part in ("up", "gate", "down")}
    names = [tensor.name for tensor in moe(48).tensors]
    expected = [r"^blk\.(1[8-9]|2[0-9]|3[0-4])\.ffn_(gate|up|down)_exps\.weight"]
    assert expected == patterns_for(meant, names)


def test_a_tensor_absent_from_a_layer_does_not_split_the_pattern() -> None:
    """A layer without one of the tensors may stand in the range of the others."""
    names = ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight", "blk.1.attn_q.weight"]
    assert patterns_for(names[:3], names) == [r"^blk\.[0-1]\.ffn_(up|gate)\.weight"]


def test_whole_layers_need_no_suffix() -> None:
    """All tensors of a layer are written as the layer."""
    names = [tensor.name for tensor in moe(12).tensors]
    assert patterns_for([name for name in names if name[:6] in ("blk.3.", "blk.4.")], names) == [
        r"^blk\.[3-4]\."
    ]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("exps", "blk.1.ffn_up_exps.weight", True),
        (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "blk.0.ffn_up_chexps.weight", True),
        (r"blk\.[[:digit:]]\.", "blk.7.attn_q.weight", True),
        (r"blk\.[[:digit:]]\.", "blk.17.attn_q.weight", False),
        (r"blk\.(?!1\.)", "blk.1.attn_q.weight", False),
        (r"\output\.weight", "output.weight", True),
        ("attn[]]", "attn]", False),
        ("a[^]c", "abc", True),
        (r"[\w.]+_exps", "x.up_exps", True),
        ("[[a]", "[", True),
        ("", "anything", True),
        (r"(ffn)_\1", "ffn_ffn", True),
        (r"blk\.\d{2}\.", "blk.12.x", True),
        ("x(ab)**y", "xababy", True),
        ("^a++b$", "aaab", True),
        ("^a++a$", "aaa", True),
        ("^(?:ab){2}{2}$", "abababab", True),
        ("^(?:ab){2}{2}$", "abab", False),
        ("x]}", "x]}", True),
    ],
)
def test_pattern_means_what_ecmascript_means(pattern: str, name: str, expected: bool) -> None:
    """Searching with the translated pattern gives the engine's answer."""
    assert expected == (compile_pattern(pattern).search(name) is not None)


@pytest.mark.parametrize(
    "pattern", ["(", "[", "*a", "(?P<n>a)", "(?<=a)b", "(?i)a", "a{x", "a\\", "[9-0]", r"(a)\2", "[[:no:]]"]
)
def test_pattern_that_the_engine_refuses_is_an_input_error(pattern: str) -> None:
    """What std::regex cannot compile is refused, Python's own extensions too."""
    with pytest.raises(InputError, match="-ot"):
        compile_pattern(pattern)


def test_layers_follow_tensor_split_with_the_output_as_one() -> None:
    """`-ts` counts layers and the output layer together; the last device gets the output."""
    assert assigned("-ngl 99 -ts 7,4").homes == ("CUDA0",) * 7 + ("CUDA1",) * 4


def test_default_split_is_by_memory() -> None:
    """Without `-ts` the layers are shared in proportion to usable memory."""
    assert layer_counts(assigned("-ngl 99")) == [8, 3, 0]


def test_partial_offload_keeps_the_first_layers_on_the_cpu() -> None:
    """`-ngl` counts from the output backwards."""
    assert assigned("-ngl 3 -ts 2,1").homes == (CPU,) * 8 + ("CUDA0", "CUDA0", "CUDA1")


def test_no_layers_on_gpus_still_gives_the_devices() -> None:
    """With `-ngl 0` everything is at home on the CPU, but the devices can still take operations."""
    assert layer_counts(assigned("-ngl 0")) == [0, 0, 11]


def test_shares_beyond_the_devices_do_not_count() -> None:
    """Only as many proportions as devices are read; when all of those are zero, memory decides."""
    assert assigned("-ts 0,0,5") == assigned("")


def test_short_split_leaves_the_other_devices_empty() -> None:
    """Proportions that are not given are zero."""
    assert layer_counts(assigned("-ts 1")) == [11, 0, 0]


def test_device_order_is_the_argument_order() -> None:
    """`-dev` sets both the set and the order of devices, whatever the case."""
    assert assigned("-dev cuda1,CUDA0").devices == ("CUDA1", "CUDA0")


def test_single_mode_picks_the_main_device() -> None:
    """`-sm none -mg N` keeps the Nth of the devices."""
    assert assigned("-sm none -mg 1").devices == ("CUDA1",)
    assert assigned("-sm none -mg 1 -dev CUDA1,CUDA0").devices == ("CUDA0",)


def test_negative_main_device_means_none() -> None:
    """`-sm none -mg -1` leaves the CPU alone."""
    assert (lambda a: (a.devices, a.homes))(assigned("-sm none -mg -1")) == ((), (CPU,) * 11)


def test_rpc_devices_come_first() -> None:
    """The engine puts remote devices before local ones, and those of unnamed servers are not there."""
    assert assigned("--rpc b:1", on=REMOTE).devices == ("RPC2", "CUDA0")
    assert assigned("", on=REMOTE).devices == ("CUDA0",)


def test_rpc_buffers_are_numbered_within_their_server() -> None:
    """`-ot` names a remote device by its number on its server."""
    assignment = assigned("--rpc a:1,b:1 -ts 1,0,0,0 -ot 'blk.1.ffn_up_exps=RPC0[b:1]'", on=REMOTE)
    assert assignment.moved == (("blk.1.ffn_up_exps.weight", "RPC2"),)


def test_first_matching_override_wins() -> None:
    """A tensor goes where the first pattern that matches it says."""
    moved = dict(assigned(r"-ts 11,0 -ot blk\.1\.ffn_up_exps=CUDA1,_exps=CPU").moved)
    assert (moved["blk.1.ffn_up_exps.weight"], moved["blk.1.ffn_gate_exps.weight"]) == ("CUDA1", CPU)


def test_an_override_to_home_shields_without_moving() -> None:
    """A tensor that a pattern puts where it is at home is not moved, and later patterns do not see it."""
    moved = dict(assigned(r"-ts 11,0 -ot blk\.1\.=CUDA0,_exps=CPU").moved)
    assert {"2", "3", "4", "5", "6", "7", "8", "9"} == {name.split(".")[1] for name in moved}


def test_unanchored_output_also_moves_attention_outputs() -> None:
    """`output.weight` matches `attn_output.weight` too, as it does in the engine."""
    assert len(assigned("-ot output.weight=CPU").moved) == 11


def test_cpu_moe_moves_every_expert_and_its_bias() -> None:
    """`-cmoe` takes experts and their biases, not the router or shared experts."""
    parts = {name.split(".", 2)[2] for name, _ in assigned("-cmoe").moved}
    assert {s for s in SUFFIXES if "_exps" in s} == parts


def test_tied_embedding_is_moved_even_to_the_cpu() -> None:
    """Where the output uses the embedding, an override takes the output's copy off its card."""
    assert assigned("-ot token_embd=CPU", moe(3, is_tied=True)).moved == (("token_embd.weight", CPU),)
    assert assigned("-ot token_embd=CPU", moe(3)).moved == ()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("-ot exps=CUDA7", "CPU, CUDA0, CUDA1"),
        ("-ot exps=CUDA_Host", "CPU, CUDA0, CUDA1"),
        ("-dev CUDA0 -ot exps=CUDA1", "must name a device that the model is given"),
        ("-dev CUDA9", "CUDA0, CUDA1"),
        ("-dev CUDA0,CUDA0", "twice"),
        ("-sm none -mg 2", "must be below 2"),
        ("-sm tensor", "no placement by device"),
        ("--rpc x:1", "must be a server of machine test"),
        ("-ot '(=CPU'", "ECMAScript"),
        ("-np -1", "must be 1 or more"),
    ],
)
def test_what_the_engine_refuses_is_an_input_error(text: str, rule: str) -> None:
    """Names that the machine does not have are refused with those it has."""
    with pytest.raises(InputError, match=re.escape(rule)):
        assigned(text)


def test_server_default_is_four_slots_on_one_cache() -> None:
    """llama-server without `-np` has four slots and a unified cache; the other programs have one sequence."""
    server = assigned("", program="llama-server").settings
    assert (server.n_slots, server.is_kv_unified) == (4, True)
    assert assigned("").settings.n_slots == 1


def test_context_zero_is_the_trained_one() -> None:
    """No context, or 0, is the context that the header says was trained."""
    assert 32768 == assigned("").settings.ctx_tokens == assigned("-c 0").settings.ctx_tokens


def test_context_per_slot_sizes_the_server() -> None:
    """`--kv-unified-per-slot` without `-c` is multiplied by the slots."""
    assert assigned("--kv-unified-per-slot 1000", program="llama-server").settings.ctx_tokens == 4 * 1000


def test_ubatch_zero_is_the_batch() -> None:
    """`-ub 0` means whole batches."""
    assert assigned("-b 1024 -ub 0").settings.ubatch_tokens == 1024


def test_overrides_are_remembered_without_a_match() -> None:
    """Any override switches pipeline parallelism off, so an assignment knows of it."""
    assert assigned("-ot nothing=CPU").settings.has_overrides
    assert not assigned("-ncmoe 0").settings.has_overrides


PLAIN = Settings(flash_attention="on", has_overrides=False)


def test_emitted_arguments_are_exact() -> None:
    """A split over both cards with moved experts is written in few words."""
    moved = tuple((t.name, CPU) for t in moe(10).tensors if t.layer in (3, 4, 5) and "_exps" in t.name)
    assignment = Assignment(
        ("CUDA0", "CUDA1"), ("CUDA0",) * 7 + ("CUDA1",) * 4, moved, replace(PLAIN, has_overrides=True)
    )
    expected = (
        r"-ngl 11 -ts 7,4 -ot '^blk\.[3-5]\.(ffn_(gate|up|down)_exps\.weight|ffn_down_exps\.bias)=CPU'"
        " -c 4096 -b 2048 -ub 512 -np 1 -ctk f16 -ctv f16 -fa on -fit off"
    )
    assert expected == shlex.join(emit_arguments(moe(10), TWO, assignment))


def test_single_card_is_selected_with_dev() -> None:
    """One of two cards is named, not numbered."""
    assignment = Assignment(("CUDA1",), ("CUDA1",) * 11, (), PLAIN)
    assert emit_arguments(moe(10), TWO, assignment)[:4] == ["-ngl", "11", "-dev", "CUDA1"]


def test_no_device_is_said() -> None:
    """An assignment without cards says `-dev none`."""
    assignment = Assignment((), (CPU,) * 11, (), PLAIN)
    assert emit_arguments(moe(10), TWO, assignment)[:4] == ["-ngl", "0", "-dev", "none"]


@pytest.mark.parametrize(
    "homes",
    [("CUDA0",) * 5 + (CPU,) * 6, ("CUDA1",) * 5 + ("CUDA0",) * 6, ("CUDA0", "CUDA1") * 5 + ("CUDA0",)],
)
def test_layers_out_of_order_cannot_be_said(homes: tuple[str, ...]) -> None:
    """Only CPU layers first and then each device's can be written in arguments."""
    with pytest.raises(InputError, match="assignment"):
        emit_arguments(moe(10), TWO, Assignment(("CUDA0", "CUDA1"), homes, (), PLAIN))


def test_unknown_tensor_cannot_be_moved() -> None:
    """A moved tensor that the model does not have is refused."""
    assignment = Assignment(("CUDA0",), ("CUDA0",) * 11, (("blk.99.x", CPU),), PLAIN)
    with pytest.raises(InputError, match="only tensors of the model"):
        emit_arguments(moe(10), ONE, assignment)


def test_planner_is_not_given_unified_cache() -> None:
    """llama-fit-params refuses `-kvu`; it plans the shared cache as one sequence."""
    assignment = Assignment(("CUDA0",), ("CUDA0",) * 11, (), replace(PLAIN, n_slots=3, is_kv_unified=True))
    assert "-kvu" in emit_arguments(moe(10), ONE, assignment)
    plan = emit_arguments(moe(10), ONE, assignment, "llama-fit-params")
    assert "-kvu" not in plan
    assert plan[plan.index("-np") + 1] == "1"


def test_shell_command_quotes() -> None:
    """A path with a space and a pattern survive the shell."""
    line = shell_command("llama-server", "/m/a b.gguf", ["-ot", r"^blk\.1\.=CPU"], ["--jinja"])
    assert shlex.split(line) == ["llama-server", "-m", "/m/a b.gguf", "-ot", r"^blk\.1\.=CPU", "--jinja"]


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Model, Machine, Assignment]:
    """Contiguous layers over any of a machine's devices, any expert tensors moved, any settings."""
    on = draw(st.sampled_from([ONE, TWO, REMOTE]))
    model = moe(draw(st.integers(1, 30)), draw(st.booleans()))
    n_all = int(model.get("block_count")) + 1
    names = [device.name for device in on.devices]
    devices = draw(st.lists(st.sampled_from(names), unique=True))
    cuts = sorted(draw(st.lists(st.integers(0, n_all), min_size=len(devices), max_size=len(devices))))
    homes = (CPU,) * (cuts[0] if cuts else n_all)
    for name, start, end in zip(devices, cuts, [*cuts[1:], n_all], strict=False):
        homes += (name,) * (end - start)
    movable = [t for t in model.tensors if t.layer is not None and "_exps" in t.name]
    targets = draw(
        st.lists(st.sampled_from([CPU, None, *devices]), min_size=len(movable), max_size=len(movable))
    )
    moved = tuple(
        (t.name, to) for t, to in zip(movable, targets, strict=True) if to and to != homes[t.layer or 0]
    )
    kv_type = st.sampled_from(["f16", "q8_0", "q4_0"])
    n_slots = draw(st.integers(1, 6))
    picked = Settings(
        ctx_tokens=draw(st.integers(1, 10**6)),
        n_slots=n_slots,
        is_kv_unified=n_slots > 1 and draw(st.booleans()),
        kv_type_k=draw(kv_type),
        kv_type_v=draw(kv_type),
        batch_tokens=draw(st.integers(1, 8192)),
        ubatch_tokens=draw(st.integers(1, 8192)),
        flash_attention=draw(st.sampled_from(["on", "off", "auto"])),
        is_kv_offloaded=draw(st.booleans()),
        is_swa_full=draw(st.booleans()),
        is_op_offloaded=draw(st.booleans()),
        load_mode=draw(st.sampled_from(["auto", "none", "mmap+mlock"])),
        has_overrides=bool(moved) or draw(st.booleans()),
        n_threads=draw(st.sampled_from([None, 8])),
    )
    return model, on, Assignment(tuple(devices), homes, moved, picked)


@given(assignments())
@settings(max_examples=200, deadline=None)
def test_assignment_survives_the_round_trip(case: tuple[Model, Machine, Assignment]) -> None:
    """`resolve(parse(emit_arguments(a)))` is `a` again."""
    model, on, assignment = case
    assert assignment == resolve(model, on, parse(emit_arguments(model, on, assignment)))


@pytest.mark.engine
@pytest.mark.parametrize("name", ["qwen3-30b-a3b-q4", "gpt-oss-120b", "gemma-3-27b-q4"])
@pytest.mark.parametrize("cuts", [(0, 20), (5, 30), (40, 40)])
def test_engine_puts_layers_and_tensors_where_meant(engine: Engine, name: str, cuts: tuple[int, int]) -> None:
    """llama-fit-params takes the arguments, and its log names the same device for each layer and tensor."""
    model = resolve_model(name)
    n_all = describe(model).n_layer_all + 1
    with rpc_workers(engine, 2) as workers, model_path(model) as path:
        cards = [card(f"RPC{i}", 200_000, worker.endpoint) for i, worker in enumerate(workers)]
        on, names = machine(*cards), tuple(device.name for device in cards)
        start, cut = min(cuts[0], n_all), min(cuts[1], n_all)
        homes = (CPU,) * start + (names[1],) * (cut - start) + (names[0],) * (n_all - cut)
        moved = tuple(
            (tensor.name, CPU if tensor.layer % 2 else names[0])
            for tensor in model.tensors
            if tensor.layer is not None and start <= tensor.layer < cut and ".ffn_up" in tensor.name
        )
        settings_ = Settings(flash_attention="on", has_overrides=bool(moved))
        assignment = Assignment((names[1], names[0]), homes, moved, settings_)
        args = emit_arguments(model, on, assignment, "llama-fit-params")
        finished = run([engine.program("llama-fit-params"), "-m", path, *args, "-fitp", "on", "-lv", "5"])
    layers = dict(re.findall(r"layer +(\d+) assigned to device (\w+)", finished.text))
    tensors = dict(re.findall(r"tensor (\S+) \(.*\) buffer type overridden to (CPU|RPC\d)", finished.text))
    assert {str(i): home for i, home in enumerate(homes)} == layers
    assert dict(moved) == tensors
