"""Which document each row of a corpus belongs to: by a column that says so, or by the titles that WikiText has.

Rows of one document are alike, so a number moves less when one of them is left out than when the document is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rsdyn.errors import UserError

if TYPE_CHECKING:
    import datasets

TITLE = r"^ = [^=\s](?:[^\n]*[^=\s])? = \n?$"
"""A row of WikiText that opens an article; its sections open with `` = = ``."""
_BATCH = 10_000


def document_of(
    rows: datasets.Dataset, *, text_column: str = "text", document_column: str | None = None
) -> np.ndarray | None:
    """The document of each row, int64 ``(n_rows,)``, numbered from 0 in the order they appear; None where nobody knows.

    With `document_column`, rows of one value there are one document, wherever they stand; a row that has none is -1.
    Without, each row that is a title (:data:`TITLE`, as WikiText writes them) opens one, and what stands before the
    first title is one too; a text with fewer than two titles has no documents that anybody knows of.

    Raises UserError where the column is not there or holds more than one value per row.
    """
    if document_column is not None:
        return _by_column(rows, document_column)
    opens = _titles(rows, text_column)
    if opens.sum() < 2:
        return None
    number = np.cumsum(opens)
    return number - number[0]


def _by_column(rows: datasets.Dataset, column: str) -> np.ndarray:
    import pyarrow

    if column not in rows.column_names:
        raise UserError(
            f"document_column={column} is not among the columns of the text: {', '.join(rows.column_names)}."
        )
    values = rows.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    try:
        encoded = values.dictionary_encode()
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid) as error:
        raise UserError(
            f"document_column={column} holds {values.type}, which names no document: give a column of text or numbers."
        ) from error
    if isinstance(encoded, pyarrow.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _titles(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Which rows are titles, read a batch at a time."""
    import pyarrow.compute

    found = [np.zeros(0, bool)]
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH):
        is_title = pyarrow.compute.match_substring_regex(batch[column], TITLE)
        found.append(is_title.fill_null(False).to_numpy().astype(bool))
    return np.concatenate(found)
