"""A launch → a command line of KoboldCpp, where its options mean the same (its koboldcpp.py, version 1.102).

Memory and speed were predicted for llama-server: KoboldCpp sizes its buffers itself. Its sampler settings
come with each request, so those of the profile are named in a comment instead.
"""

from __future__ import annotations

import shlex

from placement.configs.formats.launch import Launch, check_tokens, comment_lines
from placement.errors import InputError
from placement.llamacpp.arguments import Arguments, parse

_WHERE = "KoboldCpp"
_KV_LEVELS = {"f16": 0, "q8_0": 1, "q4_0": 2}
_BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_MIN_CTX, _MAX_CTX = 256, 262144
_SAME_EXTRA = {"--jinja": ["--jinja"], "--no-context-shift": ["--noshift"]}
# Options of the request, not of the server, in KoboldCpp.
_PER_REQUEST = ("--temp", "--top-p", "--top-k", "--min-p", "--repeat-penalty", "--seed", "--samplers")


def koboldcpp(launch: Launch) -> str:
    """The command line of KoboldCpp with CUDA.

    Raises:
        InputError: an option that it lacks, or a value outside its choices.
    """
    check_tokens(_WHERE, launch.tokens)
    given = parse(launch.args)
    _refuse_what_is_missing(given)
    tokens = ["koboldcpp", "--model", launch.model_path, *_placement(given), *_settings(given)]
    left = []
    for words in parse(launch.extra_args).other:
        if words[0] in _PER_REQUEST:
            left.append(" ".join(words))
        elif words[0] in _SAME_EXTRA:
            tokens += _SAME_EXTRA[words[0]]
        else:
            raise InputError(_WHERE, "has no option of this meaning", value=" ".join(words))
    notes = ["# for KoboldCpp; memory and speed were predicted for llama-server"]
    notes += [f"# to send with each request instead: {' '.join(left)}"] if left else []
    return "\n".join([*comment_lines(launch), *notes, shlex.join(tokens), ""])


def _placement(given: Arguments) -> list[str]:
    tokens = ["--usecuda", "--gpulayers", str(given.n_gpu_layers)]
    if given.devices is not None:
        if (
            len(given.devices) != 1
            or not given.devices[0].startswith("CUDA")
            or int(given.devices[0][4:]) > 3
        ):
            raise InputError(_WHERE, "takes all CUDA devices in their order, or one of CUDA0-3", field="-dev")
        tokens.insert(1, given.devices[0][4:])
    if given.tensor_split is not None:
        tokens += ["--tensor_split", *(f"{share:g}" for share in given.tensor_split)]
    if given.overrides:
        pairs = (f"{override.pattern}={override.target}" for override in given.overrides)
        tokens += ["--overridetensors", ",".join(pairs)]
    return tokens


def _settings(given: Arguments) -> list[str]:
    tokens = ["--contextsize", str(given.ctx_tokens), "--batchsize", str(given.ubatch_tokens)]
    tokens += ["--flashattention", "--quantkv", str(_KV_LEVELS[given.kv_type_k or "f16"])]
    tokens += [] if given.is_swa_full else ["--useswa"]
    tokens += ["--usemmap"] if given.load_mode not in ("none", "mlock") else []
    tokens += ["--usemlock"] if given.load_mode in ("mlock", "mmap+mlock") else []
    tokens += ["--lowvram"] if given.is_kv_offloaded is False else []
    return tokens + (["--threads", str(given.n_threads)] if given.n_threads is not None else [])


def _refuse_what_is_missing(given: Arguments) -> None:
    """Hold the placement against what KoboldCpp's parser and loader take."""
    rules = (
        ("-np", given.n_slots, given.n_slots == 1, "serves one slot"),
        (
            "-c",
            given.ctx_tokens,
            _MIN_CTX <= (given.ctx_tokens or 0) <= _MAX_CTX,
            f"takes {_MIN_CTX} to {_MAX_CTX}",
        ),
        ("-ub", given.ubatch_tokens, given.ubatch_tokens in _BATCHES, f"takes one of {_BATCHES}"),
        ("-ctk", given.kv_type_k, (given.kv_type_k or "f16") in _KV_LEVELS, "takes f16, q8_0 or q4_0"),
        ("-ctv", given.kv_type_v, given.kv_type_k == given.kv_type_v, "has one type for K and V"),
        ("-fa", given.flash_attention, given.flash_attention == "on", "needs flash attention for this"),
        ("-sm", given.split_mode, given.split_mode in (None, "layer"), "has layers on devices only"),
        ("--rpc", given.rpc, not given.rpc, "has no RPC workers"),
        ("--no-op-offload", given.is_op_offloaded, given.is_op_offloaded is not False, "has no such option"),
        ("-lm", given.load_mode, given.load_mode != "dio", "has no direct I/O"),
        ("-ngl", given.n_gpu_layers, (given.n_gpu_layers or 0) >= 0, "needs a number of layers"),
    )
    for option, value, is_met, rule in rules:
        if not is_met:
            raise InputError(_WHERE, rule, field=option, value=value)
