"""What the verify tests share: tiny models with random weights, solutions made by hand, and a fake llama-server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from placement.engine.find import Engine, find_engine
from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model
from placement.inputs.problem import Assignment, Problem, Settings, Workload
from placement.measure.records.schema import DevicePeak, HostPeak, Key, Predicted, Record, Timing
from placement.measure.verify.phases import Limits
from placement.measure.verify.prompts import Asked
from placement.measure.verify.run import Options, Progress
from placement.measure.verify.watch import Sample
from placement.predict.cost import Speed
from placement.predict.solution import DeviceUse, Solution, SolutionSet

N_VOCAB = 1024


def write_model(
    path: Path, *, is_moe: bool = False, n_layer: int = 4, n_embd: int = 128, seed: int = 0
) -> Path:
    """Write a small model with random weights and just enough of a vocabulary to tokenise plain text."""
    n_head, n_kv, n_ff, n_expert = 4, 2, 256, 8
    head = n_embd // n_head
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen3moe" if is_moe else "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if is_moe:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(n_ff)
    _add_vocabulary(writer)

    def weight(name: str, *shape: int, kind: type = np.float16) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.05).astype(kind))

    def norm(name: str, width: int) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    weight("token_embd.weight", N_VOCAB, n_embd)
    norm("output_norm.weight", n_embd)
    weight("output.weight", N_VOCAB, n_embd)
    for i in range(n_layer):
        block = f"blk.{i}."
        norm(block + "attn_norm.weight", n_embd)
        norm(block + "ffn_norm.weight", n_embd)
        weight(block + "attn_q.weight", n_embd, n_embd)
        weight(block + "attn_k.weight", n_kv * head, n_embd)
        weight(block + "attn_v.weight", n_kv * head, n_embd)
        weight(block + "attn_output.weight", n_embd, n_embd)
        if is_moe:
            norm(block + "attn_q_norm.weight", head)
            norm(block + "attn_k_norm.weight", head)
            weight(block + "ffn_gate_inp.weight", n_expert, n_embd, kind=np.float32)
        stack = (n_expert,) if is_moe else ()
        suffix = "_exps.weight" if is_moe else ".weight"
        weight(block + "ffn_gate" + suffix, *stack, n_ff, n_embd)
        weight(block + "ffn_up" + suffix, *stack, n_ff, n_embd)
        weight(block + "ffn_down" + suffix, *stack, n_embd, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: Any) -> None:
    """Three special tokens, the 256 bytes, and words nobody uses: text becomes one token a byte."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    n_words = N_VOCAB - len(tokens)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"\u2581w{i}" for i in range(n_words)])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * n_words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def cpu_machine() -> Machine:
    """A machine without GPUs."""
    return Machine("cpu", (), Cpu(8000, 20, 1))


def cluster(*endpoints: str, usable_mib: float = 200) -> Machine:
    """A machine of RPC workers."""
    devices = tuple(
        Device(f"RPC{i}", 256, usable_mib, 0, 50, 1, address=each) for i, each in enumerate(endpoints)
    )
    return Machine("cluster", devices, Cpu(8000, 20, 1))


def problem_of(model: Model, machine: Machine, ctx_tokens: int = 1024) -> Problem:
    """A small turn on a machine."""
    settings = Settings(ctx_tokens=ctx_tokens, flash_attention="on")
    return Problem(model, machine, settings, Workload(200, 50, ctx_tokens // 4))


def solution(name: str, *args: str, devices: tuple[str, ...] = (), decode_s: float = 0.01) -> Solution:
    """A solution made by hand."""
    use = {each: DeviceUse(10, 5, 5, 0, 200, 256) for each in devices}
    return Solution(
        name=name,
        label="estimated",
        assignment=Assignment(devices, tuple(devices[:1] or ("CPU",)) * 5),
        args=args,
        devices=use,
        splits_prompt=2,
        splits_decode=2,
        speed=Speed(decode_s, 0.1, 50, 200),
        status="OPTIMAL",
        gap=0.0,
    )


def set_of(problem: Problem, *solutions: Solution) -> SolutionSet:
    """The solutions as a solve returns them."""
    return SolutionSet(
        problem.model.name, problem.model.digest, "machine", problem.workload, "OPTIMAL", solutions
    )


SMALL = Asked(
    long_prompt=200,
    canary=256,
    repeats=1,
    least_s=0,
    short_prompt=16,
    short_generate=16,
    long_generate=4,
    canary_generate=8,
)
QUICK = Limits(plan_s=20, start_s=20, prompt_s=20, canary_s=20, stop_s=3)


def quick(tmp_path: Path, rounds: int = 1, limits: Limits = QUICK, **more: Any) -> Options:
    """Options for tests: tiny prompts, a lock of the test's own."""
    return Options(rounds=rounds, asked=SMALL, limits=limits, lock_path=tmp_path / "lock", **more)


class Lines:
    """A listener that keeps what it is told, and may act when a phase begins."""

    def __init__(self, on_phase: Any = None) -> None:
        self.said: list[str] = []
        self.phases: list[tuple[str, int, str, int]] = []
        self._on_phase = on_phase

    def say(self, text: str) -> None:
        self.said.append(text)

    def phase(self, progress: Progress) -> None:
        self.phases.append((progress.candidate, progress.round, progress.phase, progress.repeat))
        if self._on_phase is not None:
            self._on_phase(progress)

    def sample(self, sample: Sample) -> None:
        pass


KEY = Key(engine_build="b1", engine_fingerprint="f", model_digest="d", machine="m", plan="p")


def record(
    phase: str,
    outcome: str = "ok",
    *,
    name: str = "aggressive",
    round_: int = 1,
    repeat: int = 0,
    timing: Timing | None = None,
    key: Key = KEY,
    campaign: str = "c",
    **more: Any,
) -> Record:
    """A run record."""
    return Record(
        campaign=campaign, at="2026-01-01T00:00:00+00:00", key=key, round=round_, candidate=name,
        role="fit" if name.startswith("fit") else "solution", run_id=name, arguments=("-ngl", name), phase=phase,
        repeat=repeat, outcome=outcome, wall_s=1.0, timing=timing, **more,
    )  # fmt: skip


def good_round(name: str, round_: int = 1, token_s: float = 0.01, prompt_s: float = 0.001) -> list[Record]:
    """A round in which all went well, every token in that time."""
    return [
        record("plan", name=name, round_=round_),
        record("start", name=name, round_=round_, splits_decode=3),
        record("warm-up", name=name, round_=round_),
        record("short prompt", name=name, round_=round_, timing=Timing(
            n_prompt=10, prompt_s=0.1, n_generated=100, generate_s=100 * token_s)),
        record("long prompt", name=name, round_=round_, timing=Timing(
            n_prompt=200, prompt_s=200 * prompt_s, n_generated=4, generate_s=1)),
        record("canary", name=name, round_=round_, timing=Timing(
            n_prompt=256, prompt_s=1, n_generated=10, generate_s=10 * token_s)),
        record("stop", name=name, round_=round_),
    ]  # fmt: skip


FAKE_SERVER = """#!{python} -SE
import sys

ARGS = sys.argv[1:]
HELP = ["-m, --model FNAME", "-lv N", "-fit, --fit [on|off]", "-fitt, --fit-target N", "-ot X", "-ncmoe N",
        "-lm X", "--rpc X", "--log-jsonl", "-cram N", "-ctxcp N"]
if "--help" in ARGS:
    print("\\n".join(f"{{line:40}} text" for line in HELP)); sys.exit()
if "--version" in ARGS:
    print("version: 1 (abc)"); sys.exit()
if "--list-devices" in ARGS:
    print("Available devices:"); sys.exit()
import json, os, time
from pathlib import Path
HERE = Path({folder!r})
PORT = int(ARGS[ARGS.index("--port") + 1])
if PORT == 0:  # a plan
    row = dict(name="Host", total=0, free=0, self=3, model=1, context=1, compute=1)
    print("load_tensors: CPU model buffer size = 1.00 MiB\\nllama_kv_cache: CPU KV buffer size = 1.00 MiB\\n"
          "llama_kv_cache: size = 1.00 MiB (1024 cells, 1 layers, 1/1 seqs), K (f16): 1.00 MiB\\n"
          "resolve_fused_ops: Flash Attention enabled\\nsched_reserve: CPU compute buffer size = 1.00 MiB\\n"
          "sched_reserve: graph: nodes = 9, splits = 1, input objects = 1, input tensors = 1\\n"
          "sched_reserve: reserve took 1.0 ms, sched copies = 1")
    print(json.dumps(dict(type="fit_memory_breakdown", data=dict(unit="MiB", rows=[row]))))
    print("fitting params to free memory took 0.1 s", flush=True); time.sleep(60)
MODES = json.loads((HERE / "modes.json").read_text())
NAME = ARGS[ARGS.index("-ngl") + 1] if "-ngl" in ARGS else "fit"
WHEN, _, WHAT = MODES.get(NAME, "ok").partition(":")
(HERE / "starts").open("a").write(NAME + "\\n")

def fail(lines, status=1):
    print(lines, file=sys.stderr, flush=True); os._exit(status)

def act():
    if WHAT == "oom":
        fail("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9.00 MiB on device 0: cudaMalloc failed: "
             "out of memory\\nllama_model_load: error loading model: unable to allocate CUDA0 buffer")
    if WHAT == "pool":
        print("CUDA error: out of memory\\n  current device: 0, in function alloc", file=sys.stderr, flush=True)
        os.abort()
    if WHAT == "assert":
        print("ggml.c:1: GGML_ASSERT(x) failed", file=sys.stderr, flush=True); os.abort()
    if WHAT == "port":
        fail("srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 1")
    if WHAT == "argument":
        fail("error: invalid argument: -ngl")
    if WHAT == "once" and not (HERE / (NAME + ".once")).exists():
        (HERE / (NAME + ".once")).touch()
        fail("CUDA error: out of memory")
    if WHAT == "hang":
        time.sleep(600)

if WHEN == "start":
    act()

from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, row):
        body = json.dumps(row).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.answer(dict(data=[dict(id=ARGS[ARGS.index("--alias") + 1])]))
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer(dict(tokens=[1] * len(asked["content"].split())))
        n, m = len(asked["prompt"]), asked["n_predict"]
        phase = dict([(16, "short"), (200, "long"), (256, "canary")]).get(n, "")
        if WHEN == phase:
            act()
        ms = float(MODES.get(NAME + ".ms", 10))
        self.answer(dict(timings=dict(prompt_n=n, prompt_ms=n * 1.0, predicted_n=m, predicted_ms=m * ms, cache_n=0)))

print("new slot, n_ctx = 1024", file=sys.stderr, flush=True)
ThreadingTCPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""


def fake_engine(folder: Path, **modes: Any) -> Engine:
    """A folder with a llama-server of Python whose behaviour depends on `-ngl NAME`: `NAME="when:what"`."""
    import json

    folder.mkdir(exist_ok=True)
    (folder / "modes.json").write_text(json.dumps(modes))
    script = folder / "llama-server"
    if not script.exists():  # a new file would be a new build
        script.write_text(FAKE_SERVER.format(python=sys.executable, folder=str(folder)))
        script.chmod(0o755)
    result = find_engine(folder)
    assert result is not None
    return result


__all__ = ["KEY", "DevicePeak", "HostPeak", "Predicted", "Record", "Timing"]
