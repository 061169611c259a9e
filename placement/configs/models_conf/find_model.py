"""A section of a models.conf → the model it runs: by a mapping given once, its model file, or its name."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from placement.configs.models_conf.models_conf import Section
from placement.errors import InputError
from placement.files import user_config_folder, write_atomically
from placement.inputs.gguf_header.split import split_name
from placement.inputs.model import Model
from placement.inputs.model_files.files import resolve_model

MAPPING_FILE = "profiles.toml"


@dataclass
class ModelFinder:
    """Finds models for sections; `mapping` is section name to a model's name or path."""

    mapping: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None  # where relative model files are looked for: the models.conf's

    def find(self, section: Section, model_path: str | None = None) -> tuple[Model, str]:
        """The section's model, and how it was found.

        Raises:
            InputError: nothing fits; the message says how to give a mapping.
        """
        if section.name in self.mapping:
            name = self.mapping[section.name]
            return resolve_model(name), f"mapped to {name}"
        tried: list[str] = []
        for name, how in self._candidates(section, model_path):
            try:
                return resolve_model(name), how
            except InputError as exc:
                if os.path.isfile(name):
                    raise
                tried.append(exc.rule)
        raise InputError(
            f"[{section.name}]",
            f"has no model description ({tried[-1]}); say which with --map {section.name}=MODEL",
        )

    def _candidates(self, section: Section, model_path: str | None) -> list[tuple[str, str]]:
        results: list[tuple[str, str]] = []
        if model_path:
            path = Path(model_path).expanduser()
            place = path if path.is_absolute() or self.folder is None else self.folder / path
            if place.is_file():
                results.append((str(place), "by its model file"))
            named = split_name(path)
            results.append((named[0] if named else path.stem, "by its model file's name"))
        return [*results, (section.name, "by its name")]


def mapping_path() -> Path:
    """Where mappings are remembered."""
    return user_config_folder() / MAPPING_FILE


def read_mapping(given: Sequence[str] = ()) -> dict[str, str]:
    """The remembered mapping with the `section=model` pairs given now; a path is made absolute.

    Raises:
        InputError: a pair without "=", or a mapping file that cannot be read.
    """
    return {**_remembered(), **dict(_pair(text) for text in given)}


def remember(given: Sequence[str]) -> Path | None:
    """Keep `section=model` pairs for the next time; returns where, None where nothing is new.

    Raises:
        InputError: a pair without "=", or the folder cannot be written.
    """
    import tomli_w

    before = _remembered()
    after = read_mapping(given)
    if after == before:
        return None
    write_atomically(mapping_path(), tomli_w.dumps({"sections": dict(sorted(after.items()))}))
    return mapping_path()


def _remembered() -> dict[str, str]:
    path = mapping_path()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("sections", {})
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise InputError(path, f"cannot be read as TOML: {exc}") from exc
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise InputError(path, "must map section names to models", field="sections")
    return table


def _pair(text: str) -> tuple[str, str]:
    section, equals, model = text.partition("=")
    if not equals or not section.strip() or not model.strip():
        raise InputError("--map", "must be SECTION=MODEL", value=text)
    model = model.strip()
    return section.strip(), str(Path(model).resolve()) if os.path.isfile(model) else model
