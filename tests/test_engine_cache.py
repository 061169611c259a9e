"""Plans are remembered by all that they depend on, and nothing that was tampered with is believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from placement.engine.cache import PlanCache
from placement.engine.find import Engine
from placement.engine.logs import PlanReading, read_plan
from placement.engine.plan import plan
from placement.inputs.model import Model, Tensor

LOG = (Path(__file__).parent / "engine_logs" / "b11434-fit-params-cuda.log").read_text()
DEVICES = """cat <<'X'
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23000 MiB free)
  CUDA1: NVIDIA GeForce RTX 5070 Ti (16000 MiB, 15000 MiB free)
X"""
ARGUMENTS = ["-c", "4096", "-ts", "1,1"]


def reading() -> PlanReading:
    result = read_plan(LOG)
    assert result is not None
    return result


def model(name: str = "a", shape: tuple[int, ...] = (4, 4)) -> Model:
    return Model(name, {"general.architecture": "llama"}, {}, (Tensor("output.weight", shape, "F32"),))


@pytest.fixture
def cache(fake_engine: Callable[..., Engine], tmp_path: Path) -> PlanCache:
    return PlanCache(fake_engine(DEVICES), tmp_path / "plans")


def again(cache: PlanCache) -> PlanCache:
    """The same cache in a later process."""
    return PlanCache(cache.engine, cache.folder)


def only_file(cache: PlanCache) -> Path:
    (path,) = cache.folder.iterdir()
    return path


def test_round_trip(cache: PlanCache) -> None:
    """What was put is got, equal in every field, by a later process."""
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    assert again(cache).get(model(), "llama-fit-params", ARGUMENTS) == reading()


def test_name_does_not_matter(cache: PlanCache) -> None:
    """The model counts by its digest, not by its name."""
    cache.put(model("a"), "llama-fit-params", ARGUMENTS, reading())
    assert cache.get(model("b"), "llama-fit-params", ARGUMENTS) is not None


@pytest.mark.parametrize(
    ("shape", "program", "arguments"),
    [
        ((4, 8), "llama-fit-params", ARGUMENTS),
        ((4, 4), "llama-server", ARGUMENTS),
        ((4, 4), "llama-fit-params", [*ARGUMENTS, "-fa", "on"]),
        ((4, 4), "llama-fit-params", ["-ts", "1,1", "-c", "4096"]),
    ],
)
def test_anything_else_is_unknown(
    cache: PlanCache, shape: tuple[int, ...], program: str, arguments: list[str]
) -> None:
    """Another model, program or argument is another plan."""
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    assert cache.get(model(shape=shape), program, arguments) is None


def test_another_build(cache: PlanCache) -> None:
    """A build made anew in the same folder has no plans yet."""
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    (cache.engine.folder / "libllama.so").write_text("new")
    assert again(cache).get(model(), "llama-fit-params", ARGUMENTS) is None


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "VGPU"])
def test_another_device_choice(cache: PlanCache, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Other visible cards make another plan."""
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    monkeypatch.setenv(name, "7")
    assert again(cache).get(model(), "llama-fit-params", ARGUMENTS) is None


@pytest.mark.parametrize(
    ("before", "after", "arguments", "is_known"),
    [
        ("5070 Ti", "5080", ARGUMENTS, False),
        ("15000 MiB free", "14000 MiB free", ARGUMENTS, True),
        ("15000 MiB free", "14000 MiB free", ["-c", "4096"], False),
    ],
)
def test_another_device(
    cache: PlanCache, before: str, after: str, arguments: list[str], is_known: bool
) -> None:
    """Another card is another plan; other free memory only where the engine splits by it."""
    cache.put(model(), "llama-fit-params", arguments, reading())
    script = cache.engine.program("llama-fit-params")
    status = script.stat()
    size = len(script.read_text())
    script.write_text(script.read_text().replace(before, after).ljust(size))
    os.utime(script, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (again(cache).get(model(), "llama-fit-params", arguments) is not None) == is_known


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", '"x"', "\x00\x01", '{"key": {}, "reading": {}}'])
def test_corrupt_entries(cache: PlanCache, damage: str) -> None:
    """A damaged file is no plan, and the next one replaces it."""
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    only_file(cache).write_text(damage)
    assert cache.get(model(), "llama-fit-params", ARGUMENTS) is None
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    assert cache.get(model(), "llama-fit-params", ARGUMENTS) == reading()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("splits_decode", "19"),
        ("splits_decode", True),
        ("fa_enabled", "yes"),
        ("devices", {}),
        ("devices", {"CUDA0": {"weights_mib": 1}}),
        ("devices", {"Host": {"weights_mib": -1, "context_mib": 0, "compute_mib": 0, "total_mib": 0}}),
        ("kv_mib", ["much"]),
    ],
)
def test_wrong_values(cache: PlanCache, where: str, value: object) -> None:
    """An entry of the right shape with a wrong value is not believed."""
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    path = only_file(cache)
    entry = json.loads(path.read_text())
    entry["reading"][where] = value
    path.write_text(json.dumps(entry))
    assert cache.get(model(), "llama-fit-params", ARGUMENTS) is None


def test_entry_of_another_key(cache: PlanCache) -> None:
    """A file copied to another plan's name is not believed: it carries its own key."""
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    path = only_file(cache)
    cache.put(model(), "llama-fit-params", ["-c", "8192", "-ts", "1,1"], reading())
    (other,) = set(cache.folder.iterdir()) - {path}
    other.write_text(path.read_text())
    assert cache.get(model(), "llama-fit-params", ["-c", "8192", "-ts", "1,1"]) is None


def test_folder_that_cannot_be_written(fake_engine: Callable[..., Engine], tmp_path: Path) -> None:
    """A cache without a place to write remembers nothing and disturbs nobody."""
    (tmp_path / "file").write_text("")
    cache = PlanCache(fake_engine(DEVICES), tmp_path / "file" / "plans")
    cache.put(model(), "llama-fit-params", ARGUMENTS, reading())
    assert cache.get(model(), "llama-fit-params", ARGUMENTS) is None


def test_file_by_path_counts_by_its_state(cache: PlanCache, header: Path) -> None:
    """A model given by its path counts by size and time, so a file written anew is planned anew."""
    cache.put(header, "llama-fit-params", ARGUMENTS, reading())
    assert cache.get(header, "llama-fit-params", ARGUMENTS) is not None
    header.write_bytes(b"GGUF and more")
    assert cache.get(header, "llama-fit-params", ARGUMENTS) is None


def test_known_plan_asks_nobody(fake_engine: Callable[..., Engine], header: Path, tmp_path: Path) -> None:
    """A plan that is known is not made again, and says that it was remembered."""
    count = tmp_path / "count"
    answer = f'echo x >> {count}\necho "Host 1 2 3"; echo splits = 2'
    body = f'case "$*" in *--list-devices*) {DEVICES}\n exit 0;; esac\n{answer}'
    engine = fake_engine(body)
    cache = PlanCache(engine, tmp_path / "plans")
    made = [plan(engine, header, ARGUMENTS, cache=cache) for _ in range(2)]
    assert [each.is_cached for each in made] == [False, True]
    assert made[0].devices == made[1].devices
    assert count.read_text() == "x\n"
