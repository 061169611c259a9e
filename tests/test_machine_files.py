from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from placement.inputs.coefficients import DEFAULTS
from placement.inputs.machine import (
    DEFAULT_LINK_GB_PER_S,
    DEFAULT_RUNTIME_MIB,
    Coefficient,
    Cpu,
    Device,
    Machine,
)
from placement.inputs.machine_files import (
    REFERENCE_MACHINE,
    machine_toml,
    read_machine,
    resolve_machine,
    save_machine,
)

DEVICE = """[[devices]]
name = "CUDA0"
total_mib = 24576
usable_mib = 24000
bandwidth_gb_per_s = 1008
"""
RPC = """[[devices]]
name = "RPC0"
address = "10.0.0.2:50052"
total_mib = 8192
usable_mib = 8000
"""
CPU_TABLE = """[cpu]
threads = 16
usable_mib = 61440
bandwidth_gb_per_s = 50
"""


def read(text: str, folder: Path) -> Machine:
    """The machine of that file text."""
    path = folder / "m.toml"
    path.write_text(text)
    return read_machine(path)


def test_defaults_of_a_card(tmp_path: Path) -> None:
    """A CUDA card without more has 480 MiB of runtime and a PCIe 4 link."""
    device = read(DEVICE + CPU_TABLE, tmp_path).devices[0]
    assert (device.runtime_mib, device.link_gb_per_s) == (DEFAULT_RUNTIME_MIB, DEFAULT_LINK_GB_PER_S)


def test_defaults_of_a_worker(tmp_path: Path) -> None:
    """An RPC worker has no runtime and a ten gigabit link."""
    device = read(RPC + CPU_TABLE, tmp_path).devices[0]
    assert (device.runtime_mib, device.link_gb_per_s, device.address) == (0.0, 1.0, "10.0.0.2:50052")


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    """A throughput that the file does not give is None, not 0."""
    assert read(DEVICE + CPU_TABLE, tmp_path).devices[0].tflops is None


def test_named_after_file(tmp_path: Path) -> None:
    """Without a name the machine has its file's."""
    assert read(CPU_TABLE, tmp_path).name == "m"


def test_device_that_the_engine_does_not_number(tmp_path: Path) -> None:
    """OpenCL's device has no number, and may be written as the engine calls it."""
    device = read(DEVICE.replace("CUDA0", "GPUOpenCL") + CPU_TABLE, tmp_path).devices[0]
    assert (device.name, device.backend) == ("GPUOpenCL", "OpenCL")


@pytest.mark.parametrize("name", ["CPU", "Host", "CUDA", "RPC"])
def test_other_names_need_a_number(name: str, tmp_path: Path) -> None:
    """The host is no device, and a card without its number is not the engine's name."""
    with pytest.raises(InputError, match="letters and a number"):
        read(DEVICE.replace("CUDA0", name) + CPU_TABLE, tmp_path)


@pytest.mark.parametrize(
    ("name", "backend", "is_mirrored"),
    [
        ("CUDA10", "CUDA", True),
        ("RPC0", "RPC", True),
        ("ROCm0", "ROCm", False),
        ("MUSA0", "MUSA", False),
        ("Vulkan1", "Vulkan", False),
        ("SYCL0", "SYCL", False),
        ("MTL0", "Metal", False),
        ("Metal", "Metal", False),
        ("CANN0", "CANN", False),
        ("GPUOpenCL", "OpenCL", False),
        ("HTP0", "Hexagon", False),
        ("OPENVINO0", "OpenVINO", False),
        ("CUDAish0", "CUDAish", False),
    ],
)
def test_backend_is_known_by_the_device(name: str, backend: str, is_mirrored: bool) -> None:
    """llama.cpp names devices after their backend; CUDA and RPC are mirrored, no other is."""
    device = Device(name, 1000.0, 1000.0, 0.0, 100.0, 25.0)
    assert (device.backend, device.is_mirrored) == (backend, is_mirrored)


def test_no_gpu(tmp_path: Path) -> None:
    """A machine without devices is one."""
    assert read(CPU_TABLE, tmp_path).devices == ()


COEFFICIENT = '[coefficients.read_efficiency]\nvalue = 0.9\nunit = "fraction"\n'
BROKEN = [
    (
        DEVICE.replace('"CUDA0"', '"first card"'),
        "devices[0].name = 'first card': must be letters and a number",
    ),
    (DEVICE.replace('name = "CUDA0"\n', ""), "devices[0].name: is missing"),
    (DEVICE.replace('"CUDA0"', "0"), "devices[0].name = 0: must be text"),
    (DEVICE.replace("24576", "0"), "devices[0].total_mib = 0: must be positive"),
    (DEVICE.replace("24576", "-3"), "devices[0].total_mib = -3: must be positive"),
    (DEVICE.replace("24576", "nan"), "devices[0].total_mib = nan: must be a number"),
    (DEVICE.replace("24576", "inf"), "devices[0].total_mib = inf: must be a number"),
    (DEVICE.replace("24576", "true"), "devices[0].total_mib = True: must be a number"),
    (DEVICE.replace("24576", '"24 GiB"'), "devices[0].total_mib = '24 GiB': must be a number"),
    (DEVICE.replace("total_mib = 24576\n", ""), "devices[0].total_mib: is missing"),
    (DEVICE.replace("24000", "25000"), "devices[0].usable_mib = 25000.0: must be at most total_mib = 24576"),
    (DEVICE.replace("bandwidth_gb_per_s = 1008\n", ""), "devices[0].bandwidth_gb_per_s: is missing"),
    (
        DEVICE.replace("bandwidth", "bandwith"),
        "devices[0].bandwith_gb_per_s: unknown field; did you mean bandwidth_gb_per_s?",
    ),
    (DEVICE + "runtime_mib = -1\n", "devices[0].runtime_mib = -1: must be at least 0"),
    (DEVICE + "link_gb_per_s = 0\n", "devices[0].link_gb_per_s = 0: must be positive"),
    (DEVICE + "tflops = 0\n", "devices[0].tflops = 0: must be positive"),
    (DEVICE + "uuid = 5\n", "devices[0].uuid = 5: must be text"),
    (DEVICE + "compute_capability = 8.9\n", "devices[0].compute_capability = 8.9: must be text"),
    (DEVICE + "description = 1\n", "devices[0].description = 1: must be text"),
    (DEVICE + 'address = "a:1"\n', "devices[0].address = 'a:1': only an RPC worker has an address"),
    (DEVICE + DEVICE, "devices.name = 'CUDA0': two devices have this name"),
    (RPC.replace('address = "10.0.0.2:50052"\n', ""), "devices[0].address: an RPC worker needs"),
    (RPC.replace("50052", "99999"), "devices[0].address = '10.0.0.2:99999': an RPC worker needs"),
    (RPC.replace(":50052", ""), "devices[0].address = '10.0.0.2': an RPC worker needs"),
    ("devices = 3\n", "devices: must be a list of [[devices]] tables"),
    ("gpus = []\n", "gpus: unknown field"),
    ("name = 3\n", "name = 3: must be text"),
    ("coefficients = 3\n", "coefficients: must be a table"),
    (
        COEFFICIENT.replace("read_eff", "raed_eff"),
        "coefficients.raed_efficiency: unknown coefficient; did you mean read_efficiency?",
    ),
    (COEFFICIENT.replace("0.9", "0"), "coefficients.read_efficiency.value = 0: must be positive"),
    (COEFFICIENT.replace("value = 0.9\n", ""), "coefficients.read_efficiency.value: is missing"),
    (COEFFICIENT.replace('unit = "fraction"\n', ""), "coefficients.read_efficiency.unit: is missing"),
    (
        COEFFICIENT + 'source = "guessed"\n',
        "coefficients.read_efficiency.source = 'guessed': must be default, detected",
    ),
    (
        COEFFICIENT + "n_samples = 1.5\n",
        "coefficients.read_efficiency.n_samples = 1.5: must be a whole number",
    ),
    (COEFFICIENT + "uncertainty = -1\n", "coefficients.read_efficiency.uncertainty = -1: must be at least 0"),
    ("[coefficients]\nread_efficiency = 0.9\n", "coefficients.read_efficiency = 0.9: must be a table"),
    (
        '[coefficients.pipeline_overlap]\nvalue = 1.5\nunit = "fraction"\n',
        "coefficients.pipeline_overlap.value = 1.5: must be at most 1",
    ),
    ("a = [", "is not TOML"),
    ("a = " + "[" * 5000, "is not TOML"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_broken_field(text: str, words: str, tmp_path: Path) -> None:
    """Every broken field gives one line with file, field, value and rule."""
    with pytest.raises(InputError) as caught:
        read(text + CPU_TABLE if not text.startswith("a = ") else text, tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'm.toml'}: {words}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cpu: the table is missing"),
        (CPU_TABLE.replace("16", "0.5"), "cpu.threads = 0.5: must be at least 1"),
        (CPU_TABLE.replace("16", "2.5"), "cpu.threads = 2.5: must be a whole number"),
        (CPU_TABLE.replace("50", "0"), "cpu.bandwidth_gb_per_s = 0: must be positive"),
        (CPU_TABLE + "cores = 4\n", "cpu.cores: unknown field"),
    ],
)
def test_broken_cpu(text: str, words: str, tmp_path: Path) -> None:
    """The host's table is required and its fields have rules too."""
    with pytest.raises(InputError) as caught:
        read(text, tmp_path)
    assert words in str(caught.value)


def test_not_text(tmp_path: Path) -> None:
    """A binary file is refused as one."""
    (tmp_path / "m.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read: is not UTF-8 text"):
        read_machine(tmp_path / "m.toml")


def test_missing_file(tmp_path: Path) -> None:
    """A path that does not exist says so."""
    with pytest.raises(InputError, match="cannot be read: No such file"):
        resolve_machine(str(tmp_path / "none.toml"))


def test_reference_machine() -> None:
    """The reference machine is the first user's: 24,000 and 12,800 MiB."""
    machine = resolve_machine(REFERENCE_MACHINE)
    assert [(each.name, each.usable_mib) for each in machine.devices] == [("CUDA0", 24000), ("CUDA1", 12800)]


def test_nearest_name() -> None:
    """A mistyped name is answered with the one meant."""
    with pytest.raises(InputError, match=f"no machine of that name; known: {REFERENCE_MACHINE}"):
        resolve_machine("rtx4090-rtx5070")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a/b", "..", "~", "\n"])
def test_strange_name(name: str) -> None:
    """Names that no file can have are unknown names, nothing worse."""
    with pytest.raises(InputError, match="no machine of that name"):
        resolve_machine(name)


def test_nearer_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./machines/NAME.toml is taken before the shipped one."""
    monkeypatch.chdir(tmp_path)
    save_machine(Machine("mine", (), Cpu(1000, 10, 4)), Path("machines") / f"{REFERENCE_MACHINE}.toml")
    assert resolve_machine(REFERENCE_MACHINE).name == "mine"


sizes = st.floats(0.001, 1e9, allow_nan=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def devices(draw: st.DrawFn, index: int) -> Device:
    """Cards and workers of any numbers that a file may hold."""
    is_rpc = draw(st.booleans())
    total = draw(sizes)
    return Device(
        name=f"{'RPC' if is_rpc else draw(st.sampled_from(['CUDA', 'Vulkan']))}{index}",
        total_mib=total,
        usable_mib=total * draw(st.floats(0.001, 1.0)),
        runtime_mib=draw(st.floats(0, 1000)),
        bandwidth_gb_per_s=draw(sizes),
        link_gb_per_s=draw(sizes),
        description=draw(words),
        address=f"host-{index}.lan:{draw(st.integers(0, 65535))}" if is_rpc else None,
        uuid=draw(st.none() | words.filter(bool)),
        compute_capability=draw(st.none() | st.just("8.9")),
        tflops=draw(st.none() | sizes),
    )


coefficients = st.builds(
    Coefficient,
    value=st.floats(0.001, 1.0),
    unit=words.filter(bool),
    source=st.sampled_from(["default", "detected", "calibrated"]),
    date=st.none() | st.just("2026-11-24"),
    n_samples=st.none() | st.integers(0, 10**6),
    uncertainty=st.none() | st.floats(0, 1e6),
)
names = st.sampled_from([*DEFAULTS, *(f"{name}.CUDA0" for name in DEFAULTS)])


@given(
    name=words.filter(bool),
    cards=st.integers(0, 3).flatmap(lambda n: st.tuples(*(devices(i) for i in range(n)))),
    cpu=st.builds(Cpu, sizes, sizes, st.integers(1, 512), words),
    table=st.dictionaries(names, coefficients, max_size=3),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    cards: tuple[Device, ...],
    cpu: Cpu,
    table: dict[str, Coefficient],
) -> None:
    """A machine written and read again is the same machine."""
    machine = Machine(name, cards, cpu, table)
    assert machine == read(machine_toml(machine), tmp_path_factory.getbasetemp())


def test_saving_keeps_the_old_file(tmp_path: Path) -> None:
    """A machine file that is replaced stays as a backup."""
    machine = Machine("m", (), Cpu(1000, 10, 4))
    save_machine(machine, tmp_path / "m.toml")
    save_machine(dataclasses.replace(machine, name="n"), tmp_path / "m.toml")
    assert 'name = "m"' in (tmp_path / "m.toml.bak").read_text()


def test_device_by_name() -> None:
    """A machine's device is found by its name; another name is a KeyError."""
    machine = resolve_machine(REFERENCE_MACHINE)
    assert machine.device("CUDA1") is machine.devices[1]
    with pytest.raises(KeyError):
        machine.device("CUDA7")
