"""One choice for each consumer, read back by that consumer or by its rules."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from first_user import GPT_OT, QWEN_OT, choice
from hypothesis import given
from hypothesis import strategies as st

from placement.configs.formats.as_json import as_json
from placement.configs.formats.command_line import command_line
from placement.configs.formats.compose import compose
from placement.configs.formats.ik_llama import ik_llama
from placement.configs.formats.koboldcpp import koboldcpp
from placement.configs.formats.launch import Launch
from placement.configs.formats.llama_swap import llama_swap
from placement.configs.formats.router import router_ini
from placement.configs.formats.systemd import systemd
from placement.configs.formats.write import written
from placement.engine.find import Engine
from placement.errors import InputError

yaml = pytest.importorskip("yaml")

EXTRA = ("--jinja", "--temp", "1.0", "--top-p", "0.95")
GPT = Launch("gpt-oss-120b", "/m/gpt.gguf", choice("gpt-oss-120b").args, EXTRA, comments=("why\nso",))
GLM = Launch("glm-flash", "/m/g f.gguf", choice("glm-flash").args, EXTRA)
_ODD = r"""a b'c"d\e%f$g${HOME}|(h)[i]^*&!`j~"""
_TOKENS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)


def _code(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def test_command_line_is_what_a_shell_reads() -> None:
    """A real shell splits the line into the very arguments."""
    launch = replace(GPT, program="printf", model_path="x", extra_args=("--alias", _ODD))
    line = command_line(launch).replace("printf -m x", "printf '%s\\0' -m x")
    said = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said.split("\0")[:-1] == list(launch.tokens)


@given(st.lists(_TOKENS, max_size=5))
def test_any_command_line_splits_back(extra: list[str]) -> None:
    """Whatever the arguments are."""
    launch = replace(GLM, extra_args=tuple(extra))
    assert shlex.split(_code(command_line(launch))) == [launch.program, *launch.tokens]


def test_comments_are_a_line_each() -> None:
    """A comment with a line break does not become a command."""
    assert command_line(GPT).startswith("# why\n# so\nllama-server -m")


def test_preset_has_a_key_an_option() -> None:
    """The regular expression's backslashes stay single, and a flag is true."""
    text = router_ini([GPT, GLM])
    assert f"\not = {GPT_OT}\n" in text and "\njinja = true\n" in text and "\n[glm-flash]\n" in text


@pytest.mark.parametrize("value", ["a#b", "a;b", " a", "a\nb", ""])
def test_preset_refuses_what_it_cannot_hold(value: str) -> None:
    """A value ends at # and ;, and has no spaces around it."""
    with pytest.raises(InputError, match="preset"):
        router_ini([replace(GLM, extra_args=("--alias-x", value))])


def test_preset_joins_repeated_overrides() -> None:
    """Two -ot become one key, in their order."""
    text = router_ini([replace(GLM, args=("-ot", "a=CPU", "-ot", "b=CUDA0"), extra_args=())])
    assert "\not = a=CPU,b=CUDA0\n" in text


def test_preset_names_each_model_once() -> None:
    """The second section of a name would replace the first."""
    with pytest.raises(InputError, match="once"):
        router_ini([GLM, GLM])


def test_llama_swap_command_is_read_by_yaml_then_shell() -> None:
    """The cmd of each model splits into its arguments and llama-swap's own port."""
    models = yaml.safe_load(llama_swap([GPT, GLM]))["models"]
    for launch in (GPT, GLM):
        assert shlex.split(models[launch.name]["cmd"]) == [
            launch.program,
            *launch.tokens,
            "--port",
            "${PORT}",
        ]


def test_llama_swap_refuses_its_own_macros() -> None:
    """An argument with ${…} would be expanded."""
    with pytest.raises(InputError, match="expanded"):
        llama_swap([replace(GLM, extra_args=("--alias", "${x}"))])


@given(_TOKENS)
def test_compose_command_is_the_arguments(token: str) -> None:
    """After YAML and Compose's $$ each argument is as it was."""
    service = yaml.safe_load(compose(replace(GPT, extra_args=("--alias", token))))["services"]["gpt-oss-120b"]
    said = [word.replace("$$", "$") for word in service["command"]]
    assert said == [
        "-m",
        "/models/gpt.gguf",
        *GPT.args,
        "--alias",
        token,
        "--host",
        "0.0.0.0",
        "--port",
        "8080",
    ]


def test_compose_doubles_dollars() -> None:
    """A pattern's $ is no variable of Compose."""
    text = compose(replace(GPT, args=("-ot", "x$=CPU"), extra_args=()))
    assert "'x$$=CPU'" in text and not re.search(r"(?<!\$)\$(?!\$)", text)


def test_compose_mounts_the_models_folder() -> None:
    """The file's folder is the only mount, read-only, and the port is on the given address."""
    service = yaml.safe_load(compose(GLM))["services"]["glm-flash"]
    (volume,) = service["volumes"]
    assert (volume["source"], volume["target"], volume["read_only"]) == ("/m", "/models", True)
    assert service["ports"] == ["127.0.0.1:8080:8080"] and service["command"][1] == "/models/g f.gguf"


def _systemd_words(line: str) -> list[str]:
    """The words of an ExecStart= as systemd reads it: quotes and C escapes, then %% and $$."""
    result = re.findall(r'"((?:\\.|[^"\\])*)"|(\S+)', line)
    raw = [re.sub(r"\\(.)", r"\1", quoted) if quoted else bare for quoted, bare in result]
    return [word.replace("%%", "%").replace("$$", "$") for word in raw]


@given(st.lists(_TOKENS, max_size=4))
def test_systemd_words_read_back(extra: list[str]) -> None:
    """Backslash, % and $ are doubled, quotes escaped."""
    launch = replace(GPT, program="/usr/bin/llama-server", extra_args=tuple(extra))
    line = next(row for row in systemd(launch).splitlines() if row.startswith("ExecStart="))
    address = ["--host", "127.0.0.1", "--port", "8080"]
    assert _systemd_words(line.removeprefix("ExecStart=")) == [launch.program, *launch.tokens, *address]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """systemd-analyze finds nothing to say about the unit (skipped where it is missing)."""
    unit = tmp_path / "place-llama.service"
    unit.write_text(systemd(replace(GPT, program="/bin/true", extra_args=("--alias", _ODD))))
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("no systemd-analyze")
    assert not [line for line in done.stderr.splitlines() if "place-llama" in line]


def test_json_holds_the_whole_command() -> None:
    """Name, model, arguments and command, as lists."""
    (row,) = json.loads(as_json([GPT]))
    assert row["command"] == ["llama-server", *GPT.tokens] and row["args"] == list(GPT.args)


def test_control_characters_are_refused_everywhere() -> None:
    """A line break in an argument is an error of every format."""
    bad = replace(GLM, extra_args=("--alias", "a\nb"))
    for name in ("command", "preset", "llama-swap", "compose", "systemd", "ik_llama", "koboldcpp"):
        with pytest.raises(InputError):
            written(name, [bad])


def test_formats_of_one_model_refuse_two() -> None:
    """A unit runs one server."""
    with pytest.raises(InputError, match="takes one model"):
        written("systemd", [GPT, GLM])


def test_ik_llama_has_its_own_words_for_the_load_mode() -> None:
    """-lm none is --no-mmap there; -fit off is what it does anyway."""
    words = shlex.split(_code(ik_llama(GPT)))
    assert "--no-mmap" in words and not {"-lm", "-fit"} & set(words)
    assert words[words.index("-ot") + 1] == GPT_OT


@pytest.mark.parametrize(
    "args",
    [("--no-op-offload",), ("--swa-full",), ("--rpc", "h:1"), ("-fit", "on"), ("-lm", "dio"), ("-kvu",)],
)
def test_ik_llama_refuses_what_it_lacks(args: tuple[str, ...]) -> None:
    """The error names the option."""
    with pytest.raises(InputError, match=re.escape(args[0])):
        ik_llama(replace(GPT, args=(*GPT.args, *args)))


def test_koboldcpp_says_it_in_its_own_flags() -> None:
    """Layers, split, overrides, context, batch and KV type under their names there."""
    text = koboldcpp(GPT)
    words = shlex.split(_code(text))
    expected = {"--gpulayers": "37", "--contextsize": "131072", "--batchsize": "2048", "--quantkv": "1"}
    assert {name: words[words.index(name) + 1] for name in expected} == expected
    at = words.index("--tensor_split")
    assert words[at : at + 3] == ["--tensor_split", "25", "12"]
    assert words[words.index("--overridetensors") + 1] == GPT_OT
    assert "# to send with each request instead: --temp 1.0 --top-p 0.95" in text


def test_koboldcpp_takes_one_card_by_number() -> None:
    """-dev CUDA0 is --usecuda 0."""
    words = shlex.split(_code(koboldcpp(replace(GLM, args=choice("glm-flash-q4").args))))
    assert words[words.index("--usecuda") + 1] == "0"


@pytest.mark.parametrize(
    ("option", "value"),
    [("-np", "2"), ("-ub", "768"), ("-ctk", "q5_0"), ("-c", "524288"), ("-fa", "off")],
)
def test_koboldcpp_refuses_what_it_lacks(option: str, value: str) -> None:
    """A value outside its choices names the option."""
    at = GPT.args.index(option) + 1
    with pytest.raises(InputError, match=f"KoboldCpp: {option} ="):
        koboldcpp(replace(GPT, args=(*GPT.args[:at], value, *GPT.args[at + 1 :])))


def test_koboldcpp_refuses_unknown_extras() -> None:
    """An argument without a counterpart is not dropped in silence."""
    with pytest.raises(InputError, match="--mirostat 2"):
        koboldcpp(replace(GPT, extra_args=("--mirostat", "2")))


@pytest.fixture
def router(engine: Engine, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A real llama-server in router mode on a preset of three: its answer to GET /models, by id."""
    qwen = Launch(
        "qwen3-coder-q5", "/m/q.gguf", choice("qwen3-coder-q5").args, (*EXTRA, "--no-context-shift")
    )
    preset = tmp_path / "models.ini"
    preset.write_text(router_ini([GPT, GLM, qwen]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(engine.program("llama-server")), "--models-preset", str(preset), "--port", str(port)]
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [*command, "--no-models-autoload"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            rows = _models(port, server)
            yield {row["id"]: row["status"]["args"] for row in rows}
        finally:
            server.terminate()
            server.wait(20)


def _models(port: int, server: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/models", timeout=5) as answer:
                rows: list[dict[str, Any]] = json.load(answer)["data"]
                return rows
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError("llama-server did not take the preset")


@pytest.mark.engine
def test_real_router_reads_the_preset(router: dict[str, Any]) -> None:
    """llama-server's own loader gives each model its patterns, split, cache types and flags, unchanged."""
    assert set(router) >= {"gpt-oss-120b", "glm-flash", "qwen3-coder-q5"}
    for name, pattern in (("gpt-oss-120b", GPT_OT), ("qwen3-coder-q5", QWEN_OT)):
        words = router[name]
        assert words[words.index("--override-tensor") + 1] == pattern
    words = router["glm-flash"]
    values = {"--tensor-split": "32,16", "--cache-type-k": "q8_0", "--fit": "off", "--model": "/m/g f.gguf"}
    assert {option: words[words.index(option) + 1] for option in values} == values
    assert "--jinja" in words and "--no-context-shift" in router["qwen3-coder-q5"]


def test_compose_config_accepts_the_file(tmp_path: Path) -> None:
    """Docker Compose's own reader gives the very command (skipped where it is missing)."""
    path = tmp_path / "compose.yaml"
    path.write_text(compose(replace(GPT, extra_args=("--alias", _ODD))))
    asked = ["docker", "compose", "version"]
    if shutil.which("docker") is None or subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("no docker compose")
    command = ["docker", "compose", "-f", str(path), "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["services"]["gpt-oss-120b"]["command"]
    assert [word.replace("$$", "$") for word in said][2:-4] == [*GPT.args, "--alias", _ODD]
