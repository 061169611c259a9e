"""Solutions, or a models.conf's sections as they stand → launches, for the formats to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from placement.configs.formats.launch import Launch
from placement.configs.models_conf.choice import Choice
from placement.configs.models_conf.find_model import ModelFinder
from placement.configs.models_conf.models_conf import ModelsConf
from placement.configs.models_conf.options import parts_of, plain_words
from placement.configs.models_conf.review import Defaults, read_profile
from placement.errors import InputError
from placement.inputs.engine_options import names_of
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.solve.request import Request


def launch_of_choice(choice: Choice, model: Model, extra_args: Sequence[str]) -> Launch:
    """The launch of a solution, with what is predicted of it as comments."""
    memory = ", ".join(f"{name} {use.used_mib:,.0f} MiB" for name, use in choice.memory.items())
    speed = "" if choice.decode_tps is None else f"; decode {choice.decode_tps:.1f} t/s estimated"
    why = (
        f"{choice.name} for {choice.model} on {choice.machine}: {choice.criteria}",
        f"{choice.label}: {memory}; {choice.splits_decode} splits a token{speed}",
    )
    return Launch(model.name, _path(model), choice.args, tuple(extra_args), comments=why)


def launches_of_conf(
    conf: ModelsConf,
    machine: Machine,
    finder: ModelFinder,
    defaults: Defaults,
    names: Sequence[str] = (),
) -> list[Launch]:
    """The sections of those names (all without) as they stand, with the cache types they run with.

    Raises:
        InputError: a section cannot be read or has no model.
    """
    sections = [conf.section(name) for name in names] or list(conf.sections)
    launches = []
    for section in sections:
        profile = read_profile(section, machine, finder.find, defaults, Request())
        if profile.problem is not None or profile.model is None:
            raise InputError(f"[{section.name}]", profile.problem or "has no model")
        parts = parts_of(plain_words(profile.tokens))
        kept = [word for part in parts if part.values[0] not in names_of("-m") for word in part.values]
        path = profile.arguments.model_path if profile.arguments else None
        launches.append(Launch(section.name, path or _path(profile.model), tuple(_last_wins(kept))))
    return launches


def with_files(launches: Sequence[Launch], files: Mapping[str, str]) -> list[Launch]:
    """The launches with the model files that a user names.

    Raises:
        InputError: a name that no launch has.
    """
    from dataclasses import replace

    for name in files:
        if name not in [launch.name for launch in launches]:
            raise InputError("--file", "names no model that is exported", value=name)
    return [replace(launch, model_path=files.get(launch.name, launch.model_path)) for launch in launches]


def _path(model: Model) -> str:
    return model.files[0] if model.files else f"{model.name}.gguf"


def _last_wins(tokens: Sequence[str]) -> list[str]:
    """The tokens without placement options that a later one of the same kind overrules; `-ot` adds up."""
    parts = parts_of(plain_words(tokens))
    out: list[str] = []
    for i, part in enumerate(parts):
        later = {other.option for other in parts[i + 1 :] if other.option is not None}
        if part.option is None or part.option == "-ot" or part.option not in later:
            out += part.values
    return out
