"""What tells one machine from another, in machine files and in run records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from machine_simulator import bare_machine

from placement.inputs.identity import is_same_machine, machine_identity
from placement.inputs.machine import Cpu, Device, Machine


def here(**more: object) -> Machine:
    """A host with two cards, as a driver describes it."""
    cards = tuple(
        replace(each, description=f"card {i}", uuid=f"GPU-{i}")
        for i, each in enumerate(bare_machine().devices)
    )
    return replace(
        Machine("host", cards, Cpu(64000, 48, 16, "a processor")),
        **more,  # type: ignore[arg-type]
    )


def changed(index: int, **fields: object) -> Callable[[Machine], Machine]:
    """A change of one device."""

    def change(machine: Machine) -> Machine:
        devices = list(machine.devices)
        devices[index] = replace(devices[index], **fields)  # type: ignore[arg-type]
        return replace(machine, devices=tuple(devices))

    return change


OTHERS = [
    changed(1, uuid="GPU-9"),
    changed(0, uuid=None, description="another card"),
    changed(0, uuid=None, total_mib=16000.0, usable_mib=15000.0),
    changed(0, name="CUDA7"),
    lambda machine: replace(machine, devices=machine.devices[:1]),
    lambda machine: replace(machine, devices=machine.devices[::-1]),
    lambda machine: replace(machine, cpu=replace(machine.cpu, description="another processor")),
]
OLD = "host/ddc76b15"  # of `here()`, as records had it before they kept the identity


def is_same(known: Machine, result: Machine) -> bool:
    """Whether two machines are one."""
    return is_same_machine(machine_identity(known), machine_identity(result))


@pytest.mark.parametrize("change", OTHERS)
def test_a_machine_with_other_parts_is_another(change: Callable[[Machine], Machine]) -> None:
    """Another card, order, number of cards or processor is another machine, whatever its name."""
    assert not is_same(change(here()), here())


@pytest.mark.parametrize(
    "change",
    [
        lambda machine: replace(machine, name="other"),
        changed(0, uuid=None),
        changed(0, uuid=None, total_mib=24400.0),
        changed(0, usable_mib=9000.0, bandwidth_gb_per_s=900.0),
    ],
)
def test_a_machine_with_the_same_parts_is_the_same(change: Callable[[Machine], Machine]) -> None:
    """Its name, caps and speeds do not matter, nor a UUID that the file does not have."""
    assert is_same(change(here()), here())


def test_workers_are_known_by_address_and_memory() -> None:
    """Another worker behind the same name is another machine."""
    worker = Device("RPC0", 8000, 8000, 0, 50, 1, address="10.0.0.2:50052")
    known = Machine("a", (worker,), Cpu(1000, 20, 4, "p"))
    assert is_same(replace(known, name="rpc"), known)
    for other in (replace(worker, address="10.0.0.3:50052"), replace(worker, total_mib=24000)):
        assert not is_same(replace(known, devices=(other,)), known)


def test_a_processor_without_a_name_is_known_by_its_threads() -> None:
    """A machine file need not describe the processor."""
    plain = here(cpu=Cpu(64000, 48, 16))
    assert is_same(plain, here())
    assert not is_same(here(cpu=Cpu(64000, 48, 8)), here())


@pytest.mark.parametrize("known", [OLD, "any/name/ddc76b15"])
def test_an_old_record_is_known_by_its_digest(known: str) -> None:
    """The name before it does not matter."""
    assert is_same_machine(known, machine_identity(here(name="renamed")))


@pytest.mark.parametrize("change", OTHERS)
def test_an_old_record_of_another_machine_is_told(change: Callable[[Machine], Machine]) -> None:
    """The same name is not enough."""
    assert not is_same_machine(OLD, machine_identity(change(here())))


def test_old_records_are_told_apart_by_their_digests() -> None:
    """Two old records are of one machine where the digests are the same."""
    assert is_same_machine(OLD, "b/ddc76b15")
    assert not is_same_machine(OLD, "host/00000000")


def test_words_are_the_cards_or_the_processor() -> None:
    """A line names what a reader can see in the machine."""
    results = [machine_identity(each).words() for each in (here(), bare_machine(), here(devices=()))]
    assert results == ["card 0 + card 1", "CUDA0 + CUDA1", "a processor"]
