"""Tables of the service, also in a database that an earlier version has made."""

from __future__ import annotations

from sqlalchemy import Column, Engine, MetaData, Table, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateColumn


def create_tables(engine: Engine, metadata: MetaData) -> None:
    """Make the tables that are missing, and the columns that an earlier version did not have.

    New columns are empty (NULL) in the rows that are there, and earlier versions do not mind them: nothing is ever
    changed or taken away.
    """
    metadata.create_all(engine)
    for table in metadata.sorted_tables:
        for column in _missing(engine, table):
            try:
                _add(engine, table, column)
            except DBAPIError:  # another process may have added it just now
                if column in _missing(engine, table):
                    raise


def _missing(engine: Engine, table: Table) -> list[Column]:
    there = {column["name"] for column in inspect(engine).get_columns(table.name)}
    return [column for column in table.columns if column.name not in there]


def _add(engine: Engine, table: Table, column: Column) -> None:
    quoted = engine.dialect.identifier_preparer.format_table(table)
    definition = CreateColumn(column).compile(dialect=engine.dialect)
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {quoted} ADD COLUMN {definition}"))
