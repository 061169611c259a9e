"""What the first machine's owner measured, against what the shipped reference machine predicts.

The rows are facts: nvidia-smi totals (the engine's own memory, the CUDA context and, on CUDA1, the desktop), decode
splits from the log, and tokens per second at short context.
"""

from __future__ import annotations

import pytest

from placement.inputs.machine_files import REFERENCE_MACHINE, resolve_machine
from placement.inputs.model_files.files import resolve_model
from placement.inputs.problem import Workload
from placement.llamacpp.arguments import parse
from placement.predict.check import check_arguments

SHORT = "-ngl 99 -c 10240 -b 512 -ctk q8_0 -ctv q8_0 -np 1"
LONG = "-ngl 99 -b 2048 -ub 2048 -ctk q8_0 -ctv q8_0 -np 1"
GLM_35 = r"-ot blk\.([0-9]|[12][0-9]|3[0-4])\.=CUDA0,blk\.(3[5-9]|4[0-6])\.=CUDA1"
GLM_37 = r"-ot blk\.([0-9]|[12][0-9]|3[0-6])\.=CUDA0,blk\.(3[7-9]|4[0-6])\.=CUDA1"
OSS_11 = r"-ot blk\.([0-9]|10)\.=CUDA0,blk\.(1[1-3])\.=CUDA1,exps=CPU"
OSS_13 = r"-ot blk\.([0-9]|1[0-2])\.=CUDA0,blk\.(1[3-7])\.=CUDA1,exps=CPU"
QWEN_15 = r"-ot blk\.([0-9]|1[0-4])\.=CUDA0,blk\.(1[5-9]|2[0-1])\.=CUDA1,exps=CPU"
QWEN_19 = r"-ot blk\.([0-9]|1[0-8])\.=CUDA0,blk\.(19|2[0-7])\.=CUDA1,exps=CPU"
GLM_ALONE = f"{SHORT} -sm none -mg 0"

SPLITS = [
    ("glm-flash-q4", GLM_ALONE, 2),
    ("glm-flash", f"{SHORT} {GLM_35}", 33),
    ("glm-flash", f"{SHORT} {GLM_37}", 53),
    ("qwen3-coder-q5", f"{SHORT} {QWEN_19}", 133),  # the owner's own file has 136
]
TOKENS_PER_S = [
    ("glm-flash-q4", GLM_ALONE, 140.0),
    ("glm-flash", f"{SHORT} {GLM_35}", 105.0),
    ("gpt-oss-120b", f"{LONG} -c 131072 {OSS_11}", 19.0),
    ("gpt-oss-120b", f"{SHORT} {OSS_13}", 22.0),
    ("qwen3-coder-q5", f"{LONG} -c 262144 {QWEN_15}", 25.8),
    ("qwen3-coder-q5", f"{SHORT} {QWEN_19}", 30.0),
]
CUDA0_MIB = [
    ("glm-flash-q4", GLM_ALONE, 18361.0),
    ("glm-flash", f"{SHORT} {GLM_35}", 0.93 * 24576),
    ("gpt-oss-120b", f"{SHORT} {OSS_13}", 0.96 * 24576),
    ("qwen3-coder-q5", f"{SHORT} {QWEN_19}", 0.93 * 24576),
]
PROMPT_AND_ANSWER = Workload(prompt_tokens=50, generate_tokens=100, depth_tokens=200)
MACHINE = resolve_machine(REFERENCE_MACHINE)


@pytest.mark.parametrize(("name", "text", "splits"), SPLITS)
def test_decode_splits_are_those_of_the_owners_log(name: str, text: str, splits: int) -> None:
    """The owner's log said so many graph splits at batch size 1."""
    assert splits == check_arguments(resolve_model(name), MACHINE, parse(text)).splits_decode


@pytest.mark.parametrize(("name", "text", "measured"), TOKENS_PER_S)
def test_speed_is_within_six_percent_of_the_owners(name: str, text: str, measured: float) -> None:
    """The owner measured this many tokens per second; the prediction is within 6 %."""
    result = check_arguments(resolve_model(name), MACHINE, parse(text), workload=PROMPT_AND_ANSWER)
    assert result.speed.decode_tps == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(("name", "text", "measured"), CUDA0_MIB)
def test_first_card_is_within_300_mib_of_nvidia_smi(name: str, text: str, measured: float) -> None:
    """The plan with the runtime is within 300 MiB of what nvidia-smi showed on the card without a desktop."""
    result = check_arguments(resolve_model(name), MACHINE, parse(text))
    assert abs(result.devices["CUDA0"].used_mib - measured) <= 300


def test_no_coefficient_is_beyond_the_hardware() -> None:
    """Fitted efficiencies are shares of what the cards and the host can do."""
    shares = {name: c.value for name, c in MACHINE.coefficients.items() if "efficiency" in name}
    assert shares
    assert all(0 < value <= 1 for value in shares.values())
