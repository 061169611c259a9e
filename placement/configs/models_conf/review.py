"""A models.conf's sections → what each costs now, what `place` would do instead, and the gain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from placement.configs.models_conf.choice import Choice, choice_of
from placement.configs.models_conf.choice_row import choice_row
from placement.configs.models_conf.find_model import ModelFinder
from placement.configs.models_conf.models_conf import ModelsConf, Section, words
from placement.errors import InputError, PlacementError
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import Assignment
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.arguments import Arguments, parse
from placement.llamacpp.emit.resolve import resolve
from placement.llamacpp.memory import has_one_kv_type
from placement.predict.check import Check, check_arguments, check_row
from placement.solve.request import Request
from placement.solve.solve import make_problem

Find = Callable[[Section, str | None], tuple[Model, str]]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What profiles run with although their sections do not say so."""

    tokens: tuple[str, ...] = ()  # before the section's own, which win

    @classmethod
    def of_text(cls, text: str) -> Defaults:
        """The defaults in one text, such as "-ctk q8_0 -ctv q8_0"."""
        return cls(tuple(word.value for word in words(text)))


@dataclass(frozen=True)
class ProfileReview:
    """One section: `problem` says why it could not be read; `best` is None until it was solved for.

    `solution` is the row that `best` was made of, `applied` the name of the solution that the section already
    is, and `message` says why nothing fits.
    """

    section: Section
    problem: str | None = None
    model: Model | None = None
    arguments: Arguments | None = None
    tokens: tuple[str, ...] = ()  # defaults and cache types included
    now: Check | None = None
    request: Request = field(default_factory=Request)
    notes: tuple[str, ...] = ()
    best: Choice | None = None
    solution: dict[str, Any] | None = None
    applied: str | None = None
    message: str = ""


def _solved(profile: ProfileReview, machine: Machine, root: Path | None, is_fresh: bool) -> ProfileReview:
    """The profile with what `place` would do instead."""
    assert profile.model is not None
    try:
        row = choice_row(profile.model, machine, profile.request, root, is_fresh=is_fresh)
    except InputError as exc:
        return replace(profile, problem=str(exc))
    except PlacementError as exc:
        return replace(profile, message=str(exc))
    applied = next((each["name"] for each in row["solutions"] if _is_applied(profile, machine, each)), None)
    return replace(profile, best=choice_of(row), solution=row["solutions"][0], applied=applied)


def _is_applied(profile: ProfileReview, machine: Machine, solution: dict[str, Any]) -> bool:
    assert profile.model is not None and profile.now is not None
    meant = resolve(profile.model, machine, parse(solution["args"]), profile.request.program)
    return _compared(meant) == _compared(profile.now.assignment)


def _compared(assignment: Assignment) -> Assignment:
    """The assignment without the threads, which are not placement."""
    return replace(assignment, settings=replace(assignment.settings, n_threads=None))


def read_profile(
    section: Section,
    machine: Machine,
    find: Find,
    defaults: Defaults,
    request: Request,
) -> ProfileReview:
    """What a section costs now; a section that cannot be read, found or run is a profile with a problem.

    The cache types come from the section, else from `defaults`, else from the model's own description. Of
    `request` the turn, the reserve and the program count; context, slots and cache type are the section's.
    """
    bad = [text for text in section.problems if "last one counts" not in text]
    notes = [text for text in section.problems if text not in bad]
    if bad:
        return ProfileReview(section, problem="; ".join(bad), notes=tuple(notes))
    try:
        own = section.tokens()
        model, how = find(section, parse([*defaults.tokens, *own]).model_path)
        tokens, told = _with_cache_types([*defaults.tokens, *own], model)
        arguments = parse(tokens)
        asked, warned = _request(model, machine, arguments, request)
        turn = make_problem(model, machine, asked)[0].workload
        now = check_arguments(model, machine, arguments, asked.program, turn, asked.reserve_mib)
    except InputError as exc:
        return ProfileReview(section, problem=str(exc), notes=tuple(notes))
    notes += [f"model {model.name}, {how}", *told, *warned]
    return ProfileReview(section, None, model, arguments, tuple(tokens), now, asked, tuple(notes))


def _with_cache_types(tokens: Sequence[str], model: Model) -> tuple[list[str], list[str]]:
    """The tokens with the description's cache types where they name none, and a line that says so."""
    arguments, kv_type = parse(tokens), model.profile.kv_type
    options = {"-ctk": arguments.kv_type_k, "-ctv": arguments.kv_type_v}
    missing = [option for option, value in options.items() if value is None]
    if not missing or kv_type is None:
        return list(tokens), []
    added = [token for option in missing for token in (option, kv_type)]
    return [*added, *tokens], [
        f"{' '.join(added)} taken from the description of {model.name}; the section has none"
    ]


def _request(
    model: Model, machine: Machine, arguments: Arguments, request: Request
) -> tuple[Request, list[str]]:
    """What to solve for: the section's context, slots and cache types."""
    settings = resolve(model, machine, arguments, request.program).settings
    notes = []
    n_slots = settings.n_slots
    if settings.is_kv_unified and n_slots > 1:
        notes.append(f"{n_slots} slots share one cache now; solved for one slot, which has all of it (-np 1)")
        n_slots = 1
    fixed = request.fixed
    if len(settings.kv_types) > 1 and has_one_kv_type(describe(model)):
        notes.append(
            f"-ctk {settings.kv_type_k} -ctv {settings.kv_type_v} now, with which the engine does not start;"
            f" solved with {settings.kv_type_k} for both"
        )
    elif len(settings.kv_types) > 1:
        fixed = replace(fixed, kv_type_v=settings.kv_type_v)
    ctx = settings.ctx_tokens or None
    asked = replace(request, ctx_tokens=ctx, n_slots=n_slots, kv_type=settings.kv_type_k, fixed=fixed)
    return asked, notes


def review(
    conf: ModelsConf,
    machine: Machine,
    finder: ModelFinder,
    defaults: Defaults | None = None,
    request: Request | None = None,
    *,
    sections: Sequence[Section] | None = None,
    is_solved: bool = True,
    root: Path | None = None,
    is_fresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Iterator[ProfileReview]:
    """Each profile of `sections` (all without), solved for unless `is_solved` is False.

    Solutions are taken from and kept under `root`; None keeps none.
    """
    names = [section.name for section in conf.sections]
    for section in sections if sections is not None else conf.sections:
        if progress is not None:
            progress(section.name)
        profile = read_profile(section, machine, finder.find, defaults or Defaults(), request or Request())
        if names.count(section.name) > 1:
            note = f"{names.count(section.name)} sections have this name"
            profile = replace(profile, notes=(*profile.notes, note))
        if is_solved and profile.problem is None:
            profile = _solved(profile, machine, root, is_fresh)
        yield profile


def gain(profile: ProfileReview) -> dict[str, float | None]:
    """Predicted gain in percent (of speed) and seconds (of a turn); None where one of the two is unknown."""
    now, best = profile.now, profile.best
    if now is None or best is None:
        return {"decode_percent": None, "prompt_percent": None, "turn_s": None}
    return {
        "decode_percent": _percent(now.speed.decode_tps, best.decode_tps),
        "prompt_percent": _percent(now.speed.prompt_tps, best.prompt_tps),
        "turn_s": None if best.turn_s is None else round(now.speed.turn_s - best.turn_s, 4),
    }


def _percent(now: float | None, then: float | None) -> float | None:
    return round(100.0 * (then / now - 1.0), 1) if now and then is not None else None


def profile_row(profile: ProfileReview) -> dict[str, Any]:
    """The profile as one JSON object."""
    return {
        "section": profile.section.name,
        "line": profile.section.line,
        "model": profile.model.name if profile.model else None,
        "problem": profile.problem,
        "notes": list(profile.notes),
        "now": check_row(profile.now) if profile.now else None,
        "place": profile.solution,
        "message": profile.message,
        "applied": profile.applied,
        "gain": gain(profile),
    }
