"""The engine is found where the user has it, and what it says of itself is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.engine.find import ListedDevice, describe_engine, find_engine, list_devices
from placement.engine.flags import read_flags
from placement.errors import EngineMissing, EngineOutputError

DEVICES = """Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23000 MiB free)
  RPC0: 10.0.0.2:50052 (16384 MiB, 100 MiB free)
"""


def folder_with(folder: Path, *programs: str, body: str = "exit 0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs:
        (folder / program).write_text(f"#!/bin/sh\n{body}\n")
        (folder / program).chmod(0o755)
    return folder


def test_folder(tmp_path: Path) -> None:
    """A folder with a llama.cpp program is an engine, with exactly the programs that it has."""
    result = find_engine(folder_with(tmp_path, "llama-server", "llama-bench", "ls"))
    assert result is not None
    assert set(result.binaries) == {"llama-server", "llama-bench"}


def test_program_names_its_folder(tmp_path: Path) -> None:
    """A program stands for the folder it is in."""
    folder_with(tmp_path, "llama-fit-params", "llama-server")
    result = find_engine(tmp_path / "llama-server")
    assert result is not None
    assert result.program("llama-fit-params") == tmp_path / "llama-fit-params"


def test_checkout(tmp_path: Path) -> None:
    """A llama.cpp checkout stands for its build folder."""
    folder_with(tmp_path / "build" / "bin", "llama-server")
    result = find_engine(tmp_path)
    assert result is not None
    assert result.folder == tmp_path / "build" / "bin"


def test_off() -> None:
    """ "off" is no engine, and no error."""
    assert find_engine("off") is None


def test_off_in_the_environment() -> None:
    """PLACE_ENGINE=off switches the search off too."""
    assert find_engine(None, {"PLACE_ENGINE": "off", "PATH": ""}) is None


def test_environment_before_path(tmp_path: Path) -> None:
    """PLACE_ENGINE is taken before PATH."""
    named = folder_with(tmp_path / "named", "llama-server")
    on_path = folder_with(tmp_path / "path", "llama-server")
    result = find_engine("auto", {"PLACE_ENGINE": str(named), "PATH": str(on_path)})
    assert result is not None
    assert result.folder == named


def test_path(tmp_path: Path) -> None:
    """Without PLACE_ENGINE the PATH is searched."""
    result = find_engine(None, {"PATH": str(folder_with(tmp_path, "llama-fit-params"))})
    assert result is not None
    assert result.folder == tmp_path


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("/no/such/folder", "does not exist"),
        ("/bin/true", "not a llama.cpp program"),
        ("/dev", "no executable"),
    ],
)
def test_wrong_specs(spec: str, words: str) -> None:
    """What is not there, or no llama.cpp, is refused in words that name the option."""
    with pytest.raises(EngineMissing, match=f"--engine: {spec}.*{words}"):
        find_engine(spec)


def test_not_executable(tmp_path: Path) -> None:
    """A program without the right to run it is refused."""
    (tmp_path / "llama-server").write_text("x")
    with pytest.raises(EngineMissing, match="not executable"):
        find_engine(tmp_path / "llama-server")


def test_missing_program(tmp_path: Path) -> None:
    """Asking for a program that the engine has not names both."""
    result = find_engine(folder_with(tmp_path, "llama-server"))
    assert result is not None
    with pytest.raises(EngineMissing, match=r"has no llama-bench"):
        result.program("llama-bench")


def test_fingerprint_follows_the_build(tmp_path: Path) -> None:
    """Another build in the same folder has another fingerprint; the same one keeps it."""
    result = find_engine(folder_with(tmp_path, "llama-server"))
    assert result is not None
    before = result.fingerprint()
    assert before == result.fingerprint()
    (tmp_path / "libggml.so").write_text("new")
    assert before != result.fingerprint()


def test_device_list(tmp_path: Path) -> None:
    """Devices keep the engine's order; an RPC worker's description is its address."""
    result = find_engine(folder_with(tmp_path, "llama-server", body=f"cat <<'X'\n{DEVICES}X"))
    assert result is not None
    assert list_devices(result) == (
        ListedDevice("CUDA0", "NVIDIA GeForce RTX 4090", 24077, 23000),
        ListedDevice("RPC0", "10.0.0.2:50052", 16384, 100),
    )


def test_device_list_of_something_else(tmp_path: Path) -> None:
    """A program that prints no device list is not believed to have no devices."""
    result = find_engine(folder_with(tmp_path, "llama-server"))
    assert result is not None
    with pytest.raises(EngineOutputError, match="printed no device list"):
        list_devices(result)


@pytest.mark.parametrize(
    ("printed", "build", "commit"),
    [
        ("version: 8763 (ff5ef8278)", 8763, "ff5ef8278"),
        ("version: 0.6.0-dev (build 11434, commit c15c5c77a)", 11434, "c15c5c77a"),
        ("version: 0.6.0-dev (build 0, commit unknown)", None, None),
    ],
)
def test_versions(tmp_path: Path, printed: str, build: int | None, commit: str | None) -> None:
    """Old and new version lines are read; a build without a number has None, not 0."""
    body = f"cat <<'X'\n{printed}\n{DEVICES}-m, --model FNAME   x\nX"
    result = find_engine(folder_with(tmp_path, "llama-server", body=body))
    assert result is not None
    info = describe_engine(result)
    assert (build, commit) == (info.build, info.commit)


def test_lacking_flags_are_named(tmp_path: Path) -> None:
    """What an old build has not is listed per program."""
    body = f"cat <<'X'\nversion: 5000 (abc)\n{DEVICES}-m,  --model FNAME   x\n-lv, --verbosity N   x\nX"
    result = find_engine(folder_with(tmp_path, "llama-server", body=body))
    assert result is not None
    lacks = describe_engine(result).lacks
    assert "-fit" in lacks["llama-server"]
    assert "-lv" not in lacks["llama-server"]
    assert lacks["llama-fit-params"] == ("the program itself",)


OLD_HELP = """-m,    --model FNAME                    model path, see also --no-such
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
--mlock                                 force system to keep model in RAM
--no-mmap                               do not memory-map model
"""
NEW_HELP = """-m,    --model FNAME                    model path
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
-lm,   --load-mode MODE                 how to load
-fit,  --fit [on|off]                   fit
"""


def test_flags_beside_descriptions() -> None:
    """Flags that a description mentions are not the program's."""
    assert "--no-such" not in read_flags(OLD_HELP)


@pytest.mark.parametrize(
    ("help_text", "given", "spelt"),
    [
        (OLD_HELP, "-fa on -c 5", "-fa -c 5"),
        (OLD_HELP, "-fa off", ""),
        (OLD_HELP, "-fa auto", ""),
        (OLD_HELP, "-lm none", "--no-mmap"),
        (OLD_HELP, "-lm mmap", ""),
        (OLD_HELP, "--fit off -ngl 3", "-ngl 3"),
        (NEW_HELP, "-fa on -lm none -fit off", "-fa on -lm none -fit off"),
        (NEW_HELP, "--no-mmap", "-lm none"),
        (NEW_HELP, "--mlock -fa off", "-lm mlock -fa off"),
    ],
)
def test_spellings(help_text: str, given: str, spelt: str) -> None:
    """Arguments are spelt as the build at hand knows them, in both directions."""
    assert read_flags(help_text).spell(given.split()) == tuple(spelt.split())
