"""Advice on the arguments that people really write, each with its number: the cost, and what to write."""

from __future__ import annotations

from collections.abc import Callable

from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import Assignment
from placement.llamacpp.arguments import Arguments
from placement.predict.advice import context, overrides, running
from placement.predict.advice.case import Advice, Case, Plan

_RULES = (
    running.split_mode_row,
    running.removed_options,
    context.quantised_v_without_flash,
    context.kv_type_and_head_size,
    running.devices_over_cap,
    running.layers_left_on_cpu,
    overrides.kv_left_behind,
    overrides.attention_output_matched,
    overrides.router_moved,
    overrides.shared_experts_moved,
    overrides.norms_moved,
    overrides.gate_and_up_apart,
    overrides.override_without_effect,
    context.kv_on_host,
    context.kv_types_without_kernel,
    context.flash_attention_turned_off,
    running.fit_left_on,
    running.mapped_weights,
    running.ubatch_above_batch,
    running.pipeline,
    context.slots_by_default,
    context.full_window_cache,
)


def advise(
    model: Model,
    machine: Machine,
    arguments: Arguments,
    assignment: Assignment,
    planner: Callable[[Assignment], Plan] | None = None,
    program: str = "llama-server",
) -> list[Advice]:
    """Advice on arguments and the assignment that they resolve to: what stops the engine first.

    `planner` gives compute buffers and splits of any assignment; without it split counts follow the engine's
    counting rules ("about"), and advice that needs compute buffers is left out.
    """
    case = Case(model, machine, arguments, assignment, program, planner)
    return [advice for rule in _RULES for advice in rule(case)]
