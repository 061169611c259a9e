"""Arguments and environment variables are read as llama.cpp's own parser reads them."""

from __future__ import annotations

import pytest

from placement.errors import InputError
from placement.llamacpp.arguments import Override, parse


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("-ngl 35", "n_gpu_layers", 35),
        ("--gpu-layers all", "n_gpu_layers", -2),
        ("--n-gpu-layers auto", "n_gpu_layers", -1),
        ("--n_gpu_layers 99", "n_gpu_layers", 99),
        ("-ngl 12abc", "n_gpu_layers", 12),
        ("-ts 35,13", "tensor_split", (35.0, 13.0)),
        ("--tensor-split 3/1,", "tensor_split", (3.0, 1.0)),
        ("-sm none", "split_mode", "none"),
        ("-mg 1", "main_gpu", 1),
        ("-dev CUDA1,CUDA0", "devices", ("CUDA1", "CUDA0")),
        ("--device none", "devices", ()),
        ("-nkvo", "is_kv_offloaded", False),
        ("--no-kv-offload", "is_kv_offloaded", False),
        ("-nkvo -kvo", "is_kv_offloaded", True),
        ("-c 0", "ctx_tokens", 0),
        ("-b 512 -b 1024", "batch_tokens", 1024),
        ("-ub 256", "ubatch_tokens", 256),
        ("-np -1", "n_slots", -1),
        ("-kvu", "is_kv_unified", True),
        ("-kvu -no-kvu", "is_kv_unified", False),
        ("-ctk q8_0", "kv_type_k", "q8_0"),
        ("--cache-type-v iq4_nl", "kv_type_v", "iq4_nl"),
        ("-fa on", "flash_attention", "on"),
        ("-fa 0", "flash_attention", "off"),
        ("-fa -1", "flash_attention", "auto"),
        ("--swa-full", "is_swa_full", True),
        ("--no-op-offload", "is_op_offloaded", False),
        ("-lm mmap+mlock", "load_mode", "mmap+mlock"),
        ("--rpc 10.0.0.2:50052,box:1", "rpc", ("10.0.0.2:50052", "box:1")),
        ("-t -1", "n_threads", -1),
        ("-tb 8", "n_threads_batch", 8),
        ("-fit off", "is_fit", False),
        ("-fitt 512,1024", "fit_target_mib", (512, 1024)),
        ("-fitc 8192", "fit_ctx_tokens", 8192),
        ("-m 'a b.gguf'", "model_path", "a b.gguf"),
        ("/opt/llama-server -ngl 1", "program", "llama-server"),
    ],
)
def test_option_sets_its_field(text: str, field: str, expected: object) -> None:
    """Every placement option sets one field, whatever its spelling; the last one counts."""
    assert expected == getattr(parse(text), field)


def test_silence_leaves_fields_unset() -> None:
    """No argument means that nothing is known, not a default."""
    assert parse([]) == parse("", {})
    assert parse([]).n_gpu_layers is None


def test_overrides_keep_command_line_order() -> None:
    """`-ot` pairs, `-cmoe`, `-ncmoe` and `-ncffn` stand in the order given, because the first match wins."""
    arguments = parse(["-ot", r"blk\.1\.=CUDA0,exps=CPU", "-ncmoe", "1", "-cmoe", "-ncffn", "1"])
    assert arguments.overrides == (
        Override(r"blk\.1\.", "CUDA0"),
        Override("exps", "CPU"),
        Override(r"blk\.0\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU", "-ncmoe"),
        Override(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU", "-cmoe"),
        Override(r"blk\.0\.ffn_(up|down|gate)\.", "CPU", "-ncffn"),
    )


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("-ngl many", "-ngl"),
        ("-ngl 99999999999", "-ngl"),
        ("-c -5", "-c"),
        ("-c", "-c"),
        ("-b 0", "-b"),
        ("-np 0", "-np"),
        ("-ts 1,,x", "-ts"),
        ("-ts -1,2", "-ts"),
        ("-ts " + ",".join("1" * 16), "-ts"),
        ("-sm rows", "-sm"),
        ("-ctk q6_K", "-ctk"),
        ("-lm fast", "-lm"),
        ("-fit maybe", "-fit"),
        ("-ncmoe -1", "-ncmoe"),
        ("-ot exps", "-ot"),
        ("--rpc host", "--rpc"),
        ("-dev CUDA0,", "-dev"),
        ("--ctx-size=4096", "--ctx-size=4096"),
        ("-m 'open", "arguments"),
    ],
)
def test_refused_value_names_the_option(text: str, option: str) -> None:
    """A value that the engine refuses is an `InputError` that begins with the option as written."""
    with pytest.raises(InputError) as caught:
        parse(text)
    assert caught.value.where == option


def test_command_line_beats_environment() -> None:
    """A variable sets what the command line does not."""
    arguments = parse("-c 4096", {"LLAMA_ARG_CTX_SIZE": "8192", "LLAMA_ARG_UBATCH": "256"})
    assert (arguments.ctx_tokens, arguments.ubatch_tokens) == (4096, 256)


def test_environment_overrides_come_first() -> None:
    """The engine appends the command line's overrides to the environment's, so the latter win."""
    arguments = parse("-ot exps=CUDA0", {"LLAMA_ARG_OVERRIDE_TENSOR": "exps=CPU"})
    assert [override.target for override in arguments.overrides] == ["CPU", "CUDA0"]


def test_negative_variable_switches_off() -> None:
    """A LLAMA_ARG_NO_ variable turns its option off whatever it holds."""
    assert parse([], {"LLAMA_ARG_NO_KV_OFFLOAD": "0"}).is_kv_offloaded is False


def test_variable_of_a_flag_needs_a_true_value() -> None:
    """A flag's variable counts only when it is on, true, enabled or 1."""
    assert parse([], {"LLAMA_ARG_CPU_MOE": "0"}).overrides == ()
    assert len(parse([], {"LLAMA_ARG_CPU_MOE": "1"}).overrides) == 1


def test_bad_variable_is_named() -> None:
    """A refused variable is named in the error."""
    with pytest.raises(InputError, match="LLAMA_ARG_LOAD_MODE"):
        parse([], {"LLAMA_ARG_LOAD_MODE": "fast"})


def test_other_options_keep_order_and_values() -> None:
    """Options that do not place anything are kept with their values, negative numbers among them."""
    arguments = parse("--jinja -ngl 9 --temp -0.5 --port 8080 --lora-scaled a 2")
    assert arguments.other == (
        ("--jinja",),
        ("--temp", "-0.5"),
        ("--port", "8080"),
        ("--lora-scaled", "a", "2"),
    )


def test_removed_options_are_named_and_obeyed() -> None:
    """Load options of older builds keep their meaning and say what replaces them."""
    arguments = parse("--no-mmap -ngl 1")
    assert (arguments.load_mode, arguments.removed) == ("none", (("--no-mmap", "-lm none"),))


def test_bare_flash_attention_is_on() -> None:
    """`-fa` without a value, as older builds took it, means on and does not eat the next option."""
    arguments = parse("-fa -ngl 4")
    assert (arguments.flash_attention, arguments.n_gpu_layers) == ("on", 4)
    assert arguments.removed == (("-fa", "-fa on"),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"-ot blk\.([0-9]|10)\.=CUDA0,exps=CPU", r"blk\.([0-9]|10)\.=CUDA0,exps=CPU"),
        (r"-ot 'blk\.1\.=CPU'", r"blk\.1\.=CPU"),
        (r'-ot "blk\.1\.=CPU"', r"blk\.1\.=CPU"),
        (r"-ot blk\\.1\\.=CPU", r"blk\.1\.=CPU"),
        (r"-ot a\ b=CPU", "a b=CPU"),
    ],
)
def test_backslashes_of_a_pattern_survive_without_quotes(text: str, words: str) -> None:
    """A pattern pasted from a configuration file keeps its backslashes, quoted or not."""
    assert words == ",".join(f"{each.pattern}={each.target}" for each in parse(text).overrides)


def test_string_is_split_as_a_shell_does() -> None:
    """Quotes, backslashes and continued lines mean what they mean in a POSIX shell."""
    arguments = parse("llama-server \\\n -ot 'blk\\.1\\.=CPU'")
    assert arguments.overrides == (Override(r"blk\.1\.", "CPU"),)
