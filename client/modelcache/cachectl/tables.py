"""Tables that fit 80 columns."""

from __future__ import annotations

from typing import Literal

from rich.table import Table


def new_table(
    *columns: str,
    right: tuple[str, ...] = (),
    folds: tuple[str, ...] = ("MODEL",),
) -> Table:
    """A table without lines, that folds long words rather than cutting them."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["right", "left"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in folds)
    return table
