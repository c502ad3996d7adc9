"""Labels of sequences: which of a few groups, such as correct and wrong, a language or a task, each belongs to.

Labels are no part of what is recorded: they come from the rows each time, and may change without anything going through
the model again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsdyn.errors import UserError

if TYPE_CHECKING:
    import datasets

MOST_GROUPS = 30  # that are told apart; a column of more values is one of numbers, or names each row
_SHOWN = 4  # of the values of a column that is refused


@dataclass(frozen=True, eq=False)
class SequenceLabels:
    """A label of each of N sequences.

    Attributes:
        names: the groups, in the order of their names.
        code: ``(N,)`` int64, the place of each sequence's label in ``names``; -1 where it has none.
    """

    names: tuple[str, ...]
    code: np.ndarray

    def __len__(self) -> int:
        return len(self.code)

    @property
    def n_missing(self) -> int:
        """How many sequences belong to no group."""
        return int((self.code < 0).sum())

    @property
    def counts(self) -> dict[str, int]:
        """How many sequences each group has."""
        known = np.bincount(self.code[self.code >= 0], minlength=len(self.names))
        return dict(zip(self.names, known.tolist(), strict=True))

    def taken(self, which: Any) -> SequenceLabels:
        """The labels of some of the sequences; groups that none of them belongs to are gone."""
        code = self.code[which]
        there = np.unique(code[code >= 0])
        new = np.full(len(self.names) + 1, -1, np.int64)  # the last one is that of a missing label, -1
        new[there] = np.arange(len(there))
        return SequenceLabels(tuple(self.names[i] for i in there), new[code])

    def members(self, name: str, argument: str) -> np.ndarray:
        """Which sequences belong to a group, boolean ``(N,)``; ``UserError``, naming ``argument``, if there is none."""
        if name not in self.names:
            raise UserError(f"{argument}={name}: no sequence of the text is of that group. There is {self.words()}.")
        return self.code == self.names.index(name)

    def words(self) -> str:
        """The groups with their sizes, for a line of output."""
        return ", ".join(f"{name} ({n})" for name, n in self.counts.items()) or "none"

    def check(self, argument: str) -> None:
        """Raise ``UserError``, naming ``argument``, for labels that make no groups."""
        if not self.names:
            raise UserError(f"{argument}: none of the {len(self)} sequences has a label. Leave it out, or give labels.")
        if len(self.names) > MOST_GROUPS:
            shown = ", ".join(self.names[:_SHOWN])
            raise UserError(
                f"{argument}: {len(self.names)} different values in {len(self)} sequences ({shown}, ...), as numbers "
                f"or names of rows have. At most {MOST_GROUPS} groups are told apart: put the values into a few."
            )


def labels_from(values: Iterable[Any]) -> SequenceLabels:
    """Labels of sequences, from one value each; None and what is empty or blank is no label."""
    known = ["" if value is None else str(value).strip() for value in values]
    names = tuple(sorted(set(known) - {""}))
    place = {name: i for i, name in enumerate(names)}
    return SequenceLabels(names, np.array([place.get(name, -1) for name in known], np.int64))


def labels_of(rows: datasets.Dataset, column: str) -> SequenceLabels:
    """The label of each row of a corpus, by a column of text, numbers, truth values or class labels.

    Raises ``UserError`` where the column is not there, or holds more than one value per row.
    """
    if column not in rows.column_names:
        raise UserError(f"group_column={column} is not among the columns of the text: {', '.join(rows.column_names)}.")
    feature = rows.features[column]
    values = rows.select_columns([column])[:][column]
    if any(isinstance(value, (list, tuple, dict, np.ndarray)) for value in values):
        raise UserError(f"group_column={column} holds lists or mappings, which name no group: give one value per row.")
    if hasattr(feature, "int2str"):  # a column of class labels: -1 is none
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    return labels_from(None if value != value else value for value in values)  # NaN is no label
