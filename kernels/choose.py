"""Writes kernels/tables.py: the static models' choice for every target that nobody has retuned on a card.

python -m vat_fast.kernels.choose
"""

from __future__ import annotations

from pathlib import Path

from vat_fast.files import write_text
from vat_fast.kernels import tables
from vat_fast.kernels.attention_model import all_attention_tables
from vat_fast.kernels.configs import Arch
from vat_fast.kernels.static_model import all_tables, format_tables

TABLES = Path(tables.__file__)
Table = dict[Arch, list[tuple[int | None, ...]]]


def chosen() -> dict[str, Table]:
    """Every table of kernels/tables.py by the models alone."""
    return all_tables() | all_attention_tables()


def main() -> None:
    """The command line; targets in MEASURED keep their rows."""
    contents = chosen()
    for name, table in contents.items():
        for arch in tables.MEASURED:
            table[arch] = getattr(tables, name)[arch]
    write_text(TABLES, format_tables(contents, tables.MEASURED, tables.FLASH_ATTENTION))


if __name__ == "__main__":
    main()
