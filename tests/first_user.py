"""The first user's own four profiles, verbatim; and choices for them as `place solve` gave them."""

from placement.configs.models_conf.choice import Choice, Memory

CONF = r"""[glm-flash-q4]
CTX_SIZE=131072
N_GPU_LAYERS=99
FIT=on
EXTRA_ARGS=--jinja -np 1 --temp 1.0 --top-p 0.95 --min-p 0.01

[glm-flash]
CTX_SIZE=131072
N_GPU_LAYERS=99
FIT=on
EXTRA_ARGS=--jinja -np 1 --temp 1.0 --top-p 0.95 --min-p 0.01

[gpt-oss-120b]
CTX_SIZE=131072
N_GPU_LAYERS=99
FIT=off
EXTRA_ARGS=--jinja -np 1 --temp 1.0 --top-p 1.0 -b 2048 -ub 2048 -ot blk\.([0-9]|10)\.=CUDA0,blk\.(1[1-3])\.=CUDA1,exps=CPU

[qwen3-coder-q5]
CTX_SIZE=262144
N_GPU_LAYERS=99
FIT=off
EXTRA_ARGS=--jinja -np 1 -b 2048 -ub 2048 --no-context-shift --temp 1.0 --top-p 0.95 --top-k 40 --min-p 0.01 -ot blk\.([0-9]|1[0-4])\.=CUDA0,blk\.(1[5-9]|2[0-1])\.=CUDA1,exps=CPU
"""  # noqa: E501
GPT_OT = r"^blk\.(1[4-9]|2[0-9]|3[0-5])\.ffn_(gate|up|down)_exps\.(weight|bias)=CPU"
QWEN_OT = r"^blk\.(1[4-9]|[23][0-9])\.ffn_(gate|up|down)_exps\.weight=CPU"
_TAIL = ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on", "-fit", "off")
_ARGS = {
    "glm-flash-q4": ("-ngl", "48", "-dev", "CUDA0", "-c", "131072", "-b", "2048", "-ub", "2048", "-np", "1"),
    "glm-flash": ("-ngl", "48", "-ts", "32,16", "-c", "131072", "-b", "2048", "-ub", "512", "-np", "1"),
    "gpt-oss-120b": (
        *("-ngl", "37", "-ts", "25,12", "-ot", GPT_OT, "-c", "131072", "-b", "2048", "-ub", "2048"),
        *("-np", "1", "-lm", "none"),
    ),
    "qwen3-coder-q5": (
        *("-ngl", "49", "-ts", "36,13", "-ot", QWEN_OT, "-c", "262144", "-b", "2048", "-ub", "2048"),
        *("-np", "1", "-lm", "none"),
    ),
}


def choice(name: str, **changed: object) -> Choice:
    """A choice for one of the four."""
    facts: dict[str, object] = {
        "model": name,
        "machine": "rtx4090-rtx5070ti",
        "name": "aggressive",
        "args": (*_ARGS[name], *_TAIL),
        "label": "estimated",
        "memory": {"CUDA0": Memory(23000.4, 24000.0), "Host": Memory(700.0, 61440.0)},
        "splits_prompt": 3,
        "splits_decode": 2,
        "decode_tps": 120.44,
        "prompt_tps": 751.2,
        "turn_s": 6.8,
        "criteria": "takes least time within every cap",
        "is_all_on_gpus": True,
    }
    return Choice(**{**facts, **changed})  # type: ignore[arg-type]
