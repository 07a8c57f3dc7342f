"""How do results look in a notebook, and as rows?

Small escaped HTML, and tables of dicts that pandas can take over.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from residual_kernels.extras import need
from residual_kernels.visible import visible

if TYPE_CHECKING:
    import pandas

ROWS = 30  # of a table that a notebook shows


class Table(list):
    """Rows of a table: a list of dicts with the same keys.

    Args:
        rows: the dicts.
        columns: their keys in order; those of the first row by default.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), columns: Sequence[str] | None = None):
        super().__init__(rows)
        self.columns = tuple(columns if columns is not None else self[0] if self else ())

    def to_pandas(self) -> "pandas.DataFrame":
        """The rows as a pandas DataFrame.

        Raises ImportError, with what to install, where pandas is missing.
        """
        pandas = need("pandas", "pandas", "a data frame")
        return pandas.DataFrame(list(self), columns=list(self.columns))

    def __repr__(self) -> str:
        return f"Table({len(self):,} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        return card("", columns=self.columns, rows=[[row[name] for name in self.columns] for row in self])


def card(
    title: str,
    facts: Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[Any]] = (),
    notes: Iterable[str | None] = (),
) -> str:
    """A small piece of HTML: a title, facts in one line, a table of at most ROWS rows, sentences.

    All text is escaped.

    Args:
        title: what is shown; "" for none.
        facts: name -> value; facts that are None are left out.
        columns, rows: of the table.
        notes: sentences below it; None is left out.
    """
    pieces = [f"<b>{_text(title)}</b>"] if title else []
    told = [
        f"{_text(name)} <b>{_text(value)}</b>" for name, value in (facts or {}).items() if value is not None
    ]
    if told:
        pieces.append(" · ".join(told))
    found = [f"<div>{part}</div>" for part in pieces]
    if columns:
        head = "".join(f"<th>{_text(name)}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows[:ROWS]
        )
        found.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        if len(rows) > ROWS:
            found.append(f"<div>and {len(rows) - ROWS:,} more rows</div>")
    found += [f"<div>{_text(note)}</div>" for note in notes if note]
    return f"<div>{''.join(found)}</div>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    else:
        text = str(value)
    return html.escape(visible(text))


def drawing() -> Any:
    """The library of figures. Raises ImportError, with what to install, where matplotlib is missing."""
    need("matplotlib", "plot", "drawing figures")
    from residual_kernels import figures

    return figures
