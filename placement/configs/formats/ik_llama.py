"""A launch → a command line of ik_llama.cpp, where its options mean the same (its docs/parameters.md).

Memory and speed were predicted for llama.cpp: ik_llama.cpp has its own kernels and compute buffers.
"""

from __future__ import annotations

import shlex

from placement.configs.formats.launch import Launch, check_tokens, comment_lines, options_of
from placement.errors import InputError
from placement.inputs.engine_options import LOAD_MODE_AS_OLDER_FLAGS, OPTION_BY_NAME, names_of
from placement.llamacpp.arguments import parse

_WHERE = "ik_llama.cpp"
_SAME = (
    *names_of("-ngl", "-ts", "-ot", "-c", "-b", "-ub", "-np", "-fa", "-t", "-tb", "-dev", "-mg"),
    *OPTION_BY_NAME["-kvo"].off_names,
)
_SAME_KV_TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_SAME_EXTRA = (
    *("--jinja", "--temp", "--top-p", "--top-k", "--min-p", "--no-context-shift", "--chat-template"),
    *("--chat-template-file", "--chat-template-kwargs", "--reasoning-format", "--reasoning-budget"),
    *("--host", "--port", "--api-key", "-a", "--alias", "-cram", "--cache-ram", "--no-warmup"),
)
_MEANT_ANYWAY = tuple((name, "off") for name in names_of("-fit"))  # its fit is off unless asked for


def ik_llama(launch: Launch) -> str:
    """The command line of ik_llama.cpp's llama-server.

    Raises:
        InputError: an option that it lacks, or that means something else there.
    """
    check_tokens(_WHERE, launch.tokens)
    if parse(launch.args).n_slots is None:
        raise InputError(_WHERE, "has no cache shared by slots: solve with --parallel", field="-np")
    tokens = [launch.program, "-m", launch.model_path]
    for option, values in options_of((*launch.args, *launch.extra_args)):
        tokens += _translated(option, values)
    note = "# for ik_llama.cpp; memory and speed were predicted for llama.cpp"
    return "\n".join([*comment_lines(launch), note, shlex.join(tokens), ""])


def _translated(option: str, values: list[str]) -> list[str]:
    value = " ".join(values)
    if (option, value) in _MEANT_ANYWAY:
        return []
    if option in names_of("-sm") and value in ("layer", "none"):
        return [option, value]
    if option in names_of("-lm") and value in LOAD_MODE_AS_OLDER_FLAGS:
        return list(LOAD_MODE_AS_OLDER_FLAGS[value])
    if option in names_of("-ctk", "-ctv") and value in _SAME_KV_TYPES:
        return [option, value]
    if option in _SAME or option in _SAME_EXTRA:
        return [option, *values]
    raise InputError(_WHERE, "has no option of this meaning", value=f"{option} {value}".strip())
