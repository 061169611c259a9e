"""The speed model: loads and rates → seconds per token and per prompt.

Decode is a sum, because the engine's devices work one after the other; so is a prompt, but for what the engine's
stages overlap. What is summed stands in `terms`, what is multiplied in `loads` and `rates`. All results are
estimates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import mul

from placement.inputs.problem import CPU, Assignment, Problem
from placement.llamacpp.memory import placed_tensors
from placement.llamacpp.plan import ComputePlan
from placement.predict.crossings import count_crossings
from placement.predict.loads import QUANTITIES, Load, Work, total
from placement.predict.rates import Rates, rates
from placement.predict.terms import DECODE, GRAPH, OVERLAP, PROMPT, Phase, coefficient


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted seconds of a token and of a turn's parts."""

    decode_s: float
    prompt_s: float
    generate_tokens: int
    prompt_tokens: int

    @property
    def turn_s(self) -> float:
        """Seconds to read the prompt and generate the answer."""
        return self.prompt_s + self.generate_tokens * self.decode_s

    @property
    def decode_tps(self) -> float:
        """Generated tokens per second."""
        return 1.0 / self.decode_s

    @property
    def prompt_tps(self) -> float | None:
        """Prompt tokens per second; None for a workload without a prompt."""
        return self.prompt_tokens / self.prompt_s if self.prompt_tokens and self.prompt_s else None


@dataclass(frozen=True, slots=True)
class GraphCounts:
    """Splits and nodes of the prompt's and the decode's graph, from the simulated or the engine's plan."""

    splits_prompt: int
    splits_decode: int
    n_nodes_prompt: int
    n_nodes_decode: int
    n_copies: int = 1


def graph_counts(plan: ComputePlan) -> GraphCounts:
    """What the speed model needs of a plan."""
    return GraphCounts(
        plan.splits_prompt, plan.splits_decode, plan.n_nodes_prompt, plan.n_nodes_decode, plan.n_copies
    )


class CostModel:
    """What loads take on a machine's devices, and what graphs take beside them."""

    def __init__(self, work: Work, rates: Rates) -> None:
        self.n_ubatches, self.rates = len(work.ubatches), rates
        self.overlap = coefficient(work.problem.machine, OVERLAP)
        self._decode_s, self._prompt_s = (
            dict(zip(QUANTITIES, rates.at(phase, GRAPH), strict=True)) for phase in (DECODE, PROMPT)
        )

    def seconds(self, phase: Phase, load: Load, where: str) -> float:
        """Seconds of a phase's load that a device, the CPU or the graph holds: of a token, or of the whole prompt."""
        result: float = sum(map(mul, load.amounts, self.rates.at(phase, where)))
        return result

    def fixed_s(self, n_nodes_decode: int, n_nodes_prompt: int) -> tuple[float, float]:
        """(decode, prompt) seconds that every placement takes: launches, and the token's fixed time."""
        decode, prompt = self._decode_s, self._prompt_s
        return (
            decode["n_nodes"] * n_nodes_decode + decode["n_graphs"],
            (prompt["n_nodes"] * n_nodes_prompt + prompt["n_graphs"]) * self.n_ubatches,
        )

    def splits_s(self, n_decode: float, n_prompt: float, n_between: float = 0.0) -> tuple[float, float]:
        """(decode, prompt) seconds of that many splits per graph, `n_between` of decode's between GPUs."""
        decode, prompt = self._decode_s, self._prompt_s
        decode_s = decode["n_splits"] * (n_decode - n_between) + decode["n_boundaries"] * n_between
        return decode_s, prompt["n_splits"] * n_prompt * self.n_ubatches

    def rpc_s(self, n_crossings: float) -> tuple[float, float]:
        """(decode, prompt) seconds of going to a worker and back that many times per graph."""
        n_calls = 2 * n_crossings
        prompt_s = self._prompt_s["n_rpc_calls"] * n_calls * self.n_ubatches
        return self._decode_s["n_rpc_calls"] * n_calls, prompt_s


def placement_loads(work: Work, assignment: Assignment, counts: GraphCounts) -> dict[Phase, dict[str, Load]]:
    """What a placement asks of every place in each phase: of its devices in order, the CPU, and the graph."""
    names = (*assignment.devices, CPU)
    held: dict[str, list[Load]] = {name: [] for name in names}
    for placed, where in placed_tensors(work.problem.model, work.problem.machine, assignment):
        held[where].append(work.tensor(placed))
    weights = {name: total(loads) for name, loads in held.items()}
    read: dict[str, list[Load]] = {name: [weights[name]] for name in names}
    computed: dict[str, list[Load]] = {name: [weights[name]] for name in names}
    for layer, home in zip(work.architecture.layers, assignment.homes, strict=False):
        load = work.context(layer)
        read[home if assignment.settings.is_kv_offloaded else CPU].append(load)
        computed[home].append(load)
    decode_graph, prompt_graph = _graph_loads(work, assignment, counts)
    return {
        DECODE: {**{name: total(read[name]) for name in names}, GRAPH: decode_graph},
        PROMPT: {**{name: total(computed[name]) for name in names}, GRAPH: prompt_graph},
    }


def _graph_loads(work: Work, assignment: Assignment, counts: GraphCounts) -> tuple[Load, Load]:
    """Of a token's graph, and of a prompt's for all ubatches."""
    crossings = count_crossings(work.problem, assignment, counts.splits_decode)
    n, n_calls = len(work.ubatches), 2 * crossings.n_rpc
    decode = Load(
        n_splits=counts.splits_decode - crossings.n_between,
        n_boundaries=crossings.n_between,
        n_nodes=counts.n_nodes_decode,
        n_graphs=1,
        n_rpc_calls=n_calls,
    )
    prompt = Load(
        n_splits=counts.splits_prompt * n,
        n_nodes=counts.n_nodes_prompt * n,
        n_graphs=n,
        n_rpc_calls=n_calls * n,
    )
    return decode, prompt


def evaluate(problem: Problem, assignment: Assignment, counts: GraphCounts) -> Speed:
    """Predicted speed of any assignment, whoever wrote it."""
    settings, workload = assignment.settings, problem.workload
    work = Work(problem, settings)
    model = CostModel(work, rates(problem.machine, assignment.devices, settings, work.is_offloaded))
    decode_s, prompt_s = (
        {where: model.seconds(phase, load, where) for where, load in loads.items()}
        for phase, loads in placement_loads(work, assignment, counts).items()
    )
    graph_s = prompt_s.pop(GRAPH)
    stages_s = pipelined_s(prompt_s.values(), model.n_ubatches, counts.n_copies, model.overlap)
    return Speed(sum(decode_s.values()), graph_s + stages_s, workload.generate_tokens, workload.prompt_tokens)


def pipelined_s(stages: Iterable[float], n_ubatches: int, n_copies: int, overlap: float) -> float:
    """Prompt seconds of stages in series, or overlapped where the engine keeps several ubatches in flight."""
    times = list(stages)
    serial = sum(times)
    if n_copies <= 1 or n_ubatches <= 1:
        return serial
    ideal = (serial + (n_ubatches - 1) * max(times)) / n_ubatches
    return serial + overlap * (ideal - serial)
