"""The command line as it is typed: exit codes, one line for every mistake, JSON alone on stdout."""

from __future__ import annotations

import ast
import dataclasses
import json
import shlex
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from solving_support import card, expert_model, one_card

import placement.inputs.detect
from placement import __version__, cli
from placement.cli import COMMANDS, main
from placement.inputs.machine_files import REFERENCE_MACHINE, machine_toml
from placement.inputs.model_files.files import save_model


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def row(self) -> Any:
        """Its stdout as one JSON object."""
        return json.loads(self.out)


Place = Callable[[str], Ran]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    """Types a command line in an empty folder that holds a model and two machines; no GPU is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PLACE_ENGINE", raising=False)
    monkeypatch.setattr(placement.inputs.detect, "detect_hardware", lambda: (None, "no GPU here"))
    save_model(expert_model(6), tmp_path / "tiny.toml")
    Path("card.toml").write_text(machine_toml(one_card(500)))
    Path("small.toml").write_text(machine_toml(one_card(40, host_mib=200)))
    Path("other.toml").write_text("a = 1")
    Path("cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\x01" * 20)
    Path("empty.gguf").write_bytes(b"")

    def run(line: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["place", *shlex.split(line)])
        try:
            main()
            code = 0
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


SOLVE = "solve tiny.toml --machine card.toml --engine off --ubatch 512 "
CHECK = "check tiny.toml --machine card.toml --engine off "

MISTAKES = [
    "solve",
    "solve nosuch",
    "solve ''",
    "solve '[/red]'",
    "solve .",
    "solve tiny.toml extra --machine card.toml",
    "solve --ctx 4096",
    "solve --machine card.toml",
    "solve other.toml --machine card.toml",
    "solve card.toml --machine card.toml",
    "solve cut.gguf --machine card.toml",
    "solve empty.gguf --machine card.toml",
    "solve none.gguf --machine card.toml",
    "solve tiny.toml --machine nosuch",
    "solve tiny.toml --machine tiny.toml",
    "solve tiny.toml --machine other.toml",
    "solve tiny.toml --machine none.toml",
    "solve tiny.toml --machine .",
    "solve tiny.toml --machine",
    SOLVE + "--ctx 0",
    SOLVE + "--ctx -1",
    SOLVE + "--ctx many",
    SOLVE + "--ctx 1.5",
    SOLVE + "--ctx",
    SOLVE + "--parallel 0",
    SOLVE + "--parallel 257",
    SOLVE + "--kv q9_0",
    SOLVE + "--ubatch 0",
    SOLVE + "--ubatch -5",
    SOLVE + "--ubatch large",
    SOLVE + "--prompt 0",
    SOLVE + "--generate 0",
    SOLVE + "--depth -1",
    SOLVE + "--reserve -1",
    SOLVE + "--reserve nan",
    SOLVE + "--reserve inf",
    SOLVE + "--reserve lots",
    SOLVE + "--objective beauty",
    SOLVE + "--pin exps",
    SOLVE + "--pin '(=CPU'",
    SOLVE + "--pin 'exps=CUDA9'",
    SOLVE + "--pin 'nothing=CPU'",
    SOLVE + "--top 0",
    SOLVE + "--time-limit 0",
    SOLVE + "--time-limit nan",
    SOLVE + "--seed -1",
    SOLVE + "--program llama-cli",
    SOLVE + "--out other.toml",
    SOLVE + "--jsn",
    "check",
    "check nosuch --machine card.toml",
    CHECK + "--args '-ngl'",
    CHECK + "--args '-ngl many'",
    CHECK + "--args '-ot x'",
    CHECK + "--args '-ot (=CPU'",
    CHECK + "--args '-ot a=CUDA7'",
    CHECK + "--args '-dev CUDA7'",
    CHECK + "--args '-c -1'",
    CHECK + "--args '-np 0'",
    CHECK + "--args '-b 0'",
    CHECK + "--args '-ts a'",
    CHECK + "--args '-ctk q9'",
    CHECK + "--args '-ngl 99999999999999999999'",
    CHECK + '--args "open \'quote"',
    "import",
    "import none.gguf",
    "import cut.gguf",
    "import empty.gguf",
    "import other.toml",
    "import .",
    "export",
    "export tiny.toml",
    "export nosuch out.gguf",
    "export tiny.toml none/out.gguf",
    "export tiny.toml other.toml",
    "export tiny.toml .",
    "models extra",
    "machine show nosuch",
    "machine show other.toml",
    "machine frobnicate",
    "machine show card.toml extra",
    "frobnicate",
    "slove tiny.toml",
    "tiny.toml solve",
    "--frobnicate",
    "--json solve tiny.toml",
]


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake(line: str, place: Place) -> None:
    """A mistake is one clear line on stderr, nothing on stdout, exit code 2, and no traceback."""
    ran = place(line)
    lines = [each for each in ran.err.splitlines() if "using the reference machine" not in each]
    assert (ran.code, ran.out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("place: ")


@pytest.mark.parametrize("line", ["", "machine"])
def test_no_command(line: str, place: Place) -> None:
    """A command that needs another shows its help on stderr and exits with 2."""
    ran = place(line)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: place")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("solve glm-flsh", "did you mean glm-flash"),
        ("slove x", "Did you mean solve?"),
        ("solve tiny.toml --machine rtx4090", f"known: {REFERENCE_MACHINE}"),
        (SOLVE + "--kv q9_0", "unknown KV cache type"),
        ("solve cut.gguf", "cut.gguf"),
        (SOLVE + "--ctx x", "place solve --help"),
    ],
)
def test_mistake_is_explained(line: str, words: str, place: Place) -> None:
    """The line says what was meant, or where to read on."""
    assert words in place(line).err


def test_solve_prints_table_and_command(place: Place) -> None:
    """A solve names both recommendations and ends with the exact command and where it is kept."""
    ran = place(SOLVE)
    assert ran.code == 0
    for words in (
        "aggressive",
        "moderate",
        "llama-server -m tiny.gguf -ngl",
        "-fit off",
        "solution.toml (written)",
    ):
        assert words in ran.out


def test_second_solve_changes_nothing(place: Place, tmp_path: Path) -> None:
    """The same question again says so, and the file keeps its bytes and its time."""
    place(SOLVE)
    (file,) = tmp_path.glob("solutions/*/solution.toml")
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert "unchanged" in place(SOLVE).out
    assert before == (file.read_bytes(), file.stat().st_mtime_ns)
    assert [each.name for each in file.parent.iterdir()] == ["solution.toml"]


def test_solve_json_contract(place: Place) -> None:
    """Stdout is one object with the contract's keys, the first solution the recommended one."""
    row = place(SOLVE + "--json").row
    assert {"model", "machine", "workload", "status", "solutions"} <= row.keys()
    assert (row["model"], row["machine"], row["status"]) == ("tiny", "one-card", "OPTIMAL")
    first = row["solutions"][0]
    assert {
        "name", "label", "args", "extra_args", "command", "devices", "splits", "speed", "headroom_mib", "gap", "ubatch",
    } <= first.keys()  # fmt: skip
    assert (first["name"], first["label"], first["ubatch"]) == ("aggressive", "estimated", 512)
    assert list(first["devices"]) == ["CUDA0", "Host"]
    assert {"weights_mib", "context_mib", "compute_mib", "cap_mib"} <= first["devices"]["CUDA0"].keys()
    assert first["splits"].keys() == {"prompt", "decode"}
    assert {"prompt_tps", "decode_tps"} <= first["speed"].keys()
    assert first["args"][0] == "-ngl"
    assert "-m" not in first["args"]


def test_solve_json_is_what_is_kept(place: Place, tmp_path: Path) -> None:
    """solution.toml holds what --json prints, but for what is null."""
    row = place(SOLVE + "--json").row
    (file,) = tmp_path.glob("solutions/*/solution.toml")
    kept = tomllib.loads(file.read_text())
    assert kept["workload"] == row["workload"]
    assert [each["args"] for each in kept["solutions"]] == [each["args"] for each in row["solutions"]]


def test_check_of_a_solution_agrees(place: Place) -> None:
    """Checking the recommended arguments gives the memory, splits and speed that solve had predicted."""
    first = place(SOLVE + "--json").row["solutions"][0]
    ran = place(f"{CHECK} --json --args {shlex.quote(shlex.join(first['args']))}")
    row = ran.row
    assert ran.code == 0
    assert row["fits"] is True
    assert {name: use["weights_mib"] for name, use in row["devices"].items()} == {
        name: use["weights_mib"] for name, use in first["devices"].items()
    }
    assert row["splits"] == first["splits"]
    assert row["speed"]["decode_tps"] == pytest.approx(first["speed"]["decode_tps"])


def test_check_json_contract(place: Place) -> None:
    """Stdout is one object with the contract's keys."""
    row = place(CHECK + "--args '-c 4096 -ngl 99' --json").row
    keys = {"model", "machine", "label", "devices", "splits", "speed", "fits", "advice"}
    assert keys <= row.keys()
    assert row["label"] == "estimated"
    assert list(row["devices"])[-1] == "Host"
    for use in row["devices"].values():
        assert {"weights_mib", "context_mib", "compute_mib", "cap_mib"} <= use.keys()
    assert row["splits"].keys() == {"prompt", "decode"}
    assert row["speed"].keys() >= {"prompt_tps", "decode_tps"}
    assert all(each.keys() >= {"code", "message"} for each in row["advice"])


OTHER_BACKEND = [
    "solve tiny.toml --machine vulkan.toml --engine off --ubatch 512",
    "check tiny.toml --machine vulkan.toml --engine off --no-compare --args '-c 4096'",
    "explain tiny.toml --machine vulkan.toml --args '-c 4096'",
    "profiles models.conf --machine vulkan.toml",
]


@pytest.fixture
def vulkan(place: Place) -> Place:
    """The same folder with a machine of one Vulkan card, and a models.conf that runs the model."""
    machine = dataclasses.replace(one_card(4000), devices=(card("Vulkan0", 4000),))
    Path("vulkan.toml").write_text(machine_toml(machine))
    Path("models.conf").write_text("[tiny]\nCTX_SIZE=4096\nEXTRA_ARGS=-np 1 -m tiny.toml\n")
    return place


@pytest.mark.parametrize("line", OTHER_BACKEND)
def test_unmirrored_backend_is_said_to_people(line: str, vulkan: Place) -> None:
    """Every command that shows memory on it says once why that is a coarse estimate."""
    assert " ".join(vulkan(line).out.split()).count("Vulkan backend is not mirrored here") == 1


def _labelled(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a command's answer that carry `is_exact`."""
    if "profiles" in row:
        (each,) = row["profiles"]
        return [each["now"], each["place"]]
    return list(row.get("solutions") or [row])


@pytest.mark.parametrize("line", OTHER_BACKEND)
def test_unmirrored_backend_is_said_to_programs(line: str, vulkan: Place) -> None:
    """So do their JSON objects, with `is_exact` false and one note."""
    rows = _labelled(vulkan(f"{line} --json").row)
    assert [row["is_exact"] for row in rows] == [False] * len(rows)
    assert [len(row["notes"]) for row in rows] == [1] * len(rows)


def test_over_a_cap_exits_with_1(place: Place) -> None:
    """Arguments that do not fit are answered in full, and exit with 1."""
    ran = place(CHECK + "--args '-c 4096 -ngl 99' --json")
    assert (ran.code, ran.row["fits"]) == (1, False)


def test_infeasible_exits_with_1(place: Place, tmp_path: Path) -> None:
    """Where nothing fits, the caps that fail are named with what they lack, and no file is written."""
    ran = place("solve tiny.toml --machine small.toml --engine off")
    assert ran.code == 1
    assert "lacks" in ran.out + ran.err
    assert "MiB" in ran.out + ran.err
    assert not (tmp_path / "solutions").exists()


def test_infeasible_json(place: Place) -> None:
    """Nothing that fits is still one JSON object: status INFEASIBLE, a message, no solutions."""
    ran = place("solve tiny.toml --machine small.toml --engine off --json")
    assert (ran.code, ran.row["status"], ran.row["solutions"]) == (1, "INFEASIBLE", [])
    assert "lacks" in ran.row["message"]


def test_warnings_on_stderr(place: Place) -> None:
    """A context over the trained one is a warning on stderr; stdout stays one JSON object."""
    ran = place(SOLVE + "--ctx 65536 --json")
    assert "over the 32768 tokens that tiny was trained on" in ran.err
    assert ran.row["workload"]["ctx_tokens"] == 65536


def test_missing_engine_exits_with_3(place: Place) -> None:
    """An engine that is named and missing exits with 3."""
    ran = place("solve tiny.toml --machine card.toml --engine /nowhere")
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (3, "", 1)


def test_no_gpu_is_said(place: Place) -> None:
    """Without a GPU the reference machine is shown, and one line on stderr says so."""
    ran = place("machine show --json")
    assert ran.row["name"] == REFERENCE_MACHINE
    assert len(ran.err.splitlines()) == 1
    assert "no GPU here: using the reference machine" in ran.err


def test_detected_machine_is_saved(place: Place) -> None:
    """machine detect -o writes a file that --machine takes."""
    assert place("machine detect -o mine.toml").code == 0
    assert place("machine show mine.toml").code == 0


def test_import_and_export(place: Place) -> None:
    """A description exported and imported again is the same description of another name."""
    assert place("export tiny.toml out.gguf").code == 0
    assert place("import out.gguf -o again.toml").code == 0
    first, second = (tomllib.loads(Path(name).read_text()) for name in ("tiny.toml", "again.toml"))
    assert first["tensors"] == second["tensors"]


def test_models_lists_the_shipped_ones(place: Place) -> None:
    """Every shipped description is listed with a size."""
    names = [each["name"] for each in place("models --json").row["models"]]
    assert {"qwen3-coder-q5", "glm-flash", "gpt-oss-120b"} <= set(names)
    assert "GiB" in place("models").out


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, place: Place) -> None:
    """Every command's help is on stdout and has an example of it."""
    ran = place(f"{command} --help")
    assert ran.code == 0
    assert f"place {command}" in ran.out.partition("Example")[2]


def test_version(place: Place) -> None:
    """--version names the program and its version."""
    assert place("--version").out == f"place, version {__version__}\n"


def test_explain_writes_a_picture(place: Place) -> None:
    """--svg writes the map beside printing it, and says where."""
    ran = place("explain tiny.toml --machine card.toml --args '-ngl 99 -c 4096' --svg pictures/map.svg")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "pictures/map.svg (written)")
    assert Path("pictures/map.svg").read_text().startswith("<svg ")


def test_explain_keeps_its_json_alone_beside_a_picture(place: Place) -> None:
    """With --json stdout is the object, and the picture is written all the same."""
    ran = place("explain tiny.toml --machine card.toml --args '-ngl 99 -c 4096' --svg map.svg --json")
    assert len(ran.row["layers"]) == 6 and Path("map.svg").exists()


def _commands() -> list[ast.FunctionDef]:
    """The functions of the command line's modules that are commands."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(cli.__file__).parent.glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [each for each in functions if any("command" in ast.unparse(d) for d in each.decorator_list)]


def test_a_command_is_short() -> None:
    """The body of every command is at most 15 lines: it reads, calls, prints and exits."""
    bodies = [each.body[1:] for each in _commands()]  # after the help
    assert len(bodies) >= len(COMMANDS)
    lines = [(body[-1].end_lineno or 0) - body[0].lineno + 1 for body in bodies if body]
    assert max(lines) <= 15
