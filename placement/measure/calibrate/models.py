"""Run records → the model that ran: by its digest, wherever below the solutions folder it is named."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from placement.inputs.model import Model
from placement.inputs.model_files.files import resolve_model
from placement.solve.store import read_solutions

if TYPE_CHECKING:
    from placement.measure.records.schema import Record


@dataclass
class Models:
    """The models of a solutions folder."""

    root: Path
    _resolved: dict[str, Model | None] = field(default_factory=dict)

    @functools.cached_property
    def _tables(self) -> dict[Path, dict[str, Any]]:
        """Every solution.toml that can be read, by its folder."""
        results = {}
        for path in sorted(self.root.glob("*/solution.toml")):
            try:
                results[path.parent] = read_solutions(path)
            except InputError:
                continue  # it names no model: the records may
        return results

    def find(self, folder: Path, records: Sequence[Record]) -> Model:
        """The model of a run: the file that ran, or the description that was solved for and is laid out alike.

        Raises:
            InputError: it is not found any more, or is another by now.
        """
        own = self._tables.get(folder, {})
        digests = {record.key.model_digest for record in records}
        digests |= {record.solved_digest for record in records if record.solved_digest}
        if own and not any(record.solved_digest for record in records):
            digests.add(str(own["model_digest"]))
        for name in dict.fromkeys(self._names(folder, records)):
            model = self._resolve(name)
            if model is not None and model.digest in digests:
                return model
        named = own.get("model", folder.name.partition("--")[0])
        raise InputError(
            folder / "runs.jsonl", "its model is not found, or is another by now", field="model", value=named
        )

    def _names(self, folder: Path, records: Sequence[Record]) -> Iterator[str]:
        """What may name the model, the likeliest first."""
        tables = [self._tables[folder]] if folder in self._tables else []
        for table in (*tables, *(each for path, each in self._tables.items() if path != folder)):
            yield str(table["model"])
            words = [word for row in table["solutions"] for word in str(row.get("command", "")).split()]
            yield from (word for word in words if word.endswith(".gguf"))
        yield from (record.model_file for record in records if record.model_file)
        yield folder.name.partition("--")[0]

    def _resolve(self, name: str) -> Model | None:
        if name not in self._resolved:
            try:
                self._resolved[name] = resolve_model(name)
            except InputError:
                self._resolved[name] = None
        return self._resolved[name]
