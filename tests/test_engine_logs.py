"""Logs of several builds, recorded and reconstructed (engine_logs/README.md), read as what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.engine.failures import classify_failure
from placement.engine.logs import EngineMemory, PlanReading, read_plan, read_run

LOGS = Path(__file__).parent / "engine_logs"


def text_of(name: str) -> str:
    return (LOGS / name).read_text()


def plan_of(name: str) -> PlanReading:
    reading = read_plan(text_of(name))
    assert reading is not None
    return reading


def run_of(name: str) -> PlanReading:
    reading = read_run(text_of(name))
    assert reading is not None
    return reading


def test_current_table() -> None:
    """The breakdown table of b11434 gives MiB per device, the sum rounded by the engine itself."""
    assert plan_of("b11434-fit-params-cuda.log").devices == {
        "CUDA0": EngineMemory(11755, 1117, 824, 13697),
        "CUDA1": EngineMemory(34066, 2222, 823, 37111),
        "Host": EngineMemory(8967, 0, 272, 9239),
    }


def test_json_lines_say_the_same() -> None:
    """`--log-jsonl` gives exactly what the plain log gives."""
    assert plan_of("b11434-fit-params-cuda.jsonl") == plan_of("b11434-fit-params-cuda.log")


def test_graph_of_two_sizes() -> None:
    """Prompt and decode splits and nodes are told apart where they differ."""
    reading = plan_of("b11434-fit-params-cuda.log")
    expected = (27, 19, 5288, 5288)
    assert expected == (
        reading.splits_prompt,
        reading.splits_decode,
        reading.nodes_prompt,
        reading.nodes_decode,
    )


def test_caches_of_a_hybrid_model() -> None:
    """KV cache and recurrent state are told apart."""
    reading = plan_of("b11434-fit-params-cuda.log")
    assert (reading.kv_mib, reading.rs_mib) == ((3264.0,), (75.38,))


def test_flash_attention_and_copies() -> None:
    """Two cards with every layer on them run four pipeline copies, with flash attention."""
    reading = plan_of("b11434-fit-params-pipeline.log")
    assert (reading.fa_enabled, reading.n_copies) == (True, 4)


def test_repacked_weights_are_host_memory() -> None:
    """CPU_REPACK, which llama-fit-params leaves out of its short output, is added to Host and named."""
    reading = plan_of("b11434-fit-params-rpc.log")
    assert reading.devices["Host"].weights_mib == 10811
    assert reading.extra_buffers["CPU_REPACK"].weights_mib > 0


def test_two_caches_of_a_sliding_window_model() -> None:
    """A model with sliding windows has two KV caches, in the order of the log."""
    assert plan_of("b11434-fit-params-rpc.log").kv_mib == (288.0, 27.0)


def test_server_that_was_ended_early() -> None:
    """What llama-server prints before it loads anything is enough; negative free memory is no trouble."""
    assert plan_of("b11434-server-fit-cuda.log").devices["CUDA1"] == EngineMemory(34066, 2222, 823, 37111)


def test_short_output_alone() -> None:
    """Without any breakdown the rows of `-fitp` are read."""
    reading = read_plan("CUDA0 100 20 3 \nHost 5 0 1 \n")
    assert reading is not None
    assert reading.devices == {"CUDA0": EngineMemory(100, 20, 3, 123), "Host": EngineMemory(5, 0, 1, 6)}
    assert reading.splits_decode is None


def test_last_measurement_counts() -> None:
    """When the engine measures several times, the last measurement is the plan."""
    text = text_of("b11434-fit-params-cuda.log") + text_of("b11434-fit-params-pipeline.log")
    assert read_plan(text) == plan_of("b11434-fit-params-pipeline.log")


def test_early_2026() -> None:
    """Logs of early 2026 (llama_memory_breakdown_print, "with bs=") are read, overflowed numbers too."""
    reading = plan_of("reconstructed-2026-02-fit.log")
    assert reading.devices["CUDA0"] == EngineMemory(9814, 252, 51, 10118)
    assert (
        reading.splits_prompt,
        reading.splits_decode,
        reading.fa_enabled,
        reading.rs_mib,
    ) == (255, 98, True, (75.38,))


def test_draft_model_is_added() -> None:
    """A draft model that the server measures as well is added, weights included."""
    reading = plan_of("reconstructed-2026-06-server-draft.log")
    assert reading.devices["CUDA0"] == EngineMemory(16364, 822, 340, 17526)
    assert reading.splits_decode == 2


def test_mtp_layers_share_the_weights() -> None:
    """Where the engine's own sum has the extra weights once, only context and buffers are added."""
    text = text_of("reconstructed-2026-06-server-draft.log").replace("use 17526 MiB", "use 16526 MiB")
    reading = read_plan(text)
    assert reading is not None
    assert reading.devices["CUDA0"] == EngineMemory(15364, 822, 340, 16526)


@pytest.mark.parametrize(
    ("name", "device", "memory", "splits"),
    [
        ("reconstructed-2024-run.log", "CUDA1", (2090.25, 480.0, 640.02), (3, 3)),
        ("reconstructed-2025-03-run.log", "CUDA0", (577.22, 80.0, 300.75), (114, 3)),
        ("reconstructed-2025-03-run.log", "Host", (520.3, 32.0, 6.01), (114, 3)),
        ("reconstructed-2025-08-run.log", "Host", (7380.84, 0.0, 12.01), (62, 62)),
        ("b11434-server-run-rpc.log", "RPC0", (4.27, 8.0, 25.8), (3, 3)),
    ],
)
def test_buffers_of_a_run(
    name: str, device: str, memory: tuple[float, float, float], splits: tuple[int, int]
) -> None:
    """The buffers that a run allocates are summed per device, the host's kinds together."""
    reading = run_of(name)
    result = reading.devices[device]
    assert memory == pytest.approx((result.weights_mib, result.context_mib, result.compute_mib))
    assert splits == (reading.splits_prompt, reading.splits_decode)


def test_second_worker_is_another_device() -> None:
    """`RPC0[host:port]` of the second worker is device RPC1: buffers count per worker, devices over all."""
    assert set(run_of("b11434-server-run-rpc.log").devices) == {"Host", "RPC0", "RPC1"}


@pytest.mark.parametrize(
    ("name", "fa_enabled"), [("reconstructed-2025-03-run.log", False), ("reconstructed-2024-run.log", True)]
)
def test_flash_attention_as_a_number(name: str, fa_enabled: bool) -> None:
    """Builds until 2025 print flash attention as 0 or 1."""
    assert run_of(name).fa_enabled is fa_enabled


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("b11434-server-oom-weights.log", "out-of-memory", "allocating 4.27 MiB on device 0"),
        ("b11434-server-oom-kv.log", "out-of-memory", "allocating 8192.00 MiB on device 0"),
        ("b11434-server-oom-compute.log", "out-of-memory", "allocating"),
        ("b11434-server-oom-inference.log", "out-of-memory", "CUDA error: out of memory"),
        ("b11434-server-gpu-error.log", "gpu-error", "ggml-cuda.cu:109: CUDA error"),
        ("b11434-server-bad-argument.log", "bad-argument", "invalid argument: --no-such-flag"),
        ("b11434-server-bad-setting.log", "bad-setting", "quantized V cache requires flash_attn"),
        ("b11434-server-port-taken.log", "port-taken", "couldn't bind HTTP server socket"),
    ],
)
def test_failures_are_named(name: str, kind: str, words: str) -> None:
    """Each recorded failure is named, with the line that tells it, without the log's time prefix."""
    failure = classify_failure(text_of(name))
    assert failure is not None
    assert failure.kind == kind
    assert words in failure.line
    assert not failure.line[:1].isdigit()


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("CUDA error: out of memory", "out-of-memory"),
        ("/x/ggml-cuda.cu:109: CUDA error", "gpu-error"),
        ("/x/ggml-cuda.cu:109: CUDA error\nCUDA error: out of memory", "out-of-memory"),
        ("/x/ggml-cuda.cu:109: CUDA error\nCUDA error: an illegal memory access", "abort"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "out-of-memory"),
        ("CUDA error: an illegal memory access was encountered", "abort"),
        ("ggml-backend.cpp:12: GGML_ASSERT(x) failed", "abort"),
        ("llama_model_load: error loading model: unknown model architecture: 'x'", "bad-model"),
        ('{"type":"log","time":1,"level":"error","msg":"main: error: no such thing\\n"}', "error"),
    ],
)
def test_single_lines(line: str, kind: str) -> None:
    """The lines that llama.cpp dies with are told apart."""
    failure = classify_failure(line)
    assert failure is not None
    assert failure.kind == kind


def test_nothing_to_read() -> None:
    """Text that is no log gives nothing rather than zeros."""
    assert (read_plan("hello\n"), read_run("hello\n"), classify_failure("hello\n")) == (None, None, None)


@pytest.mark.parametrize("cut", range(0, 4000, 157))
def test_torn_logs(cut: int) -> None:
    """A log that ends anywhere, as of a killed engine, is read or is nothing, and never an exception."""
    for name in ("b11434-fit-params-cuda.jsonl", "b11434-fit-params-cuda.log"):
        text = text_of(name)
        reading = read_plan(text[: len(text) - cut])
        assert reading is None or reading.devices
