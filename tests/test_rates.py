from __future__ import annotations

import dataclasses

import pytest
from solving_support import one_card, two_cards

from placement.inputs.machine import Device, Machine
from placement.inputs.problem import CPU, Settings
from placement.predict.loads import QUANTITIES
from placement.predict.rates import link_place, places, rates, stream_s_per_byte
from placement.predict.terms import PROMPT


def with_worker() -> Machine:
    """A card, and a worker beside it."""
    machine = two_cards(1000, 1000)
    worker = dataclasses.replace(machine.devices[1], name="RPC0", address="a:1")
    return dataclasses.replace(machine, devices=(machine.devices[0], worker))


def test_rpc_worker_has_no_part_in_streaming() -> None:
    """Host weights go to the first CUDA device, wherever it stands in the order."""
    streamed = places(with_worker(), ("RPC0", "CUDA0"), Settings())[PROMPT][CPU]
    assert (streamed.name, streamed.kinds) == ("CUDA0", ("device", "pageable"))
    assert link_place(with_worker(), ("RPC0",), Settings()) is None


@pytest.mark.parametrize(
    ("is_op_offloaded", "is_offloaded", "expected"),
    [(True, True, True), (False, True, False), (True, False, False)],
)
def test_what_the_host_holds_is_streamed(is_op_offloaded: bool, is_offloaded: bool, expected: bool) -> None:
    """Only with operation offload, and ubatches that are large enough for it."""
    settings = Settings(is_op_offloaded=is_op_offloaded)
    assert rates(one_card(1000), ("CUDA0",), settings, is_offloaded).is_streamed == expected


def test_a_streamed_byte_takes_the_links_time() -> None:
    """Of 25 GB/s, 95 % where memory is pinned and 45 % where it is mapped."""
    machine = one_card(1000)
    links = [link_place(machine, ("CUDA0",), Settings(load_mode=mode)) for mode in ("none", "mmap")]
    results = [stream_s_per_byte(machine, link) for link in links if link is not None]
    assert results == pytest.approx([1 / 25e9 / 0.95, 1 / 25e9 / 0.45])


def test_unknown_throughput_is_guessed_from_bandwidth() -> None:
    """A card without tflops has 0.12 for each GB/s."""
    machine = one_card(1)

    def flop_s(device: Device) -> float:
        of_it = dataclasses.replace(machine, devices=(device,))
        return rates(of_it, ("CUDA0",), Settings()).at(PROMPT, "CUDA0")[QUANTITIES.index("dense_flops")]

    known = dataclasses.replace(machine.devices[0], bandwidth_gb_per_s=1000, tflops=120.0)
    assert flop_s(dataclasses.replace(known, tflops=None)) == pytest.approx(flop_s(known))
