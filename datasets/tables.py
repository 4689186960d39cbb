"""Tables in CSV and Parquet files: numbers with a label; and texts."""

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.cache import CODE, cache_folder, digest, fingerprint
from datasets.errors import SourceError
from datasets.examples import LARGEST, Examples
from datasets.expressions import ALLOWED, ExpressionError, evaluate
from datasets.files import existing, reading_as, split_off
from datasets.lazy import all_examples
from datasets.names import fault, listed, shown, too_many
from datasets.partitions import FEWEST

ABANDONED_S = 3600.0  # since something was written into a file that is being made


class Table(NamedTuple):
    """The rows of one or several files with the same columns.

    Attributes:
        path: the file or folder.
        rows: of all files, one after the other.
        files: in the order of their names.
        file: [rows] the place in ``files`` of the one that a row comes from.
    """

    path: str
    rows: pd.DataFrame
    files: list[Path]
    file: NDArray[np.int64]

    @property
    def columns(self) -> str:
        """The names of columns, for an error message."""
        return listed(list(self.rows.columns))


def csv(path: str | Path, label: str, group: str, target: str = "class") -> Examples:
    """A table, or a folder of tables with the same columns: numbers, and a label.

    Missing values stay NaN. ``label`` is a column or an expression of columns (``"target > 0"``,
    see :mod:`datasets.expressions`), which are no features then; ``group`` a column, or empty: a
    folder's files are the natural sites. Where the ``target`` is numbers or several labels,
    ``label`` may be several of these with commas between them.

    Raises:
        SourceError: a file is no table, a row is longer than the header, a value no number or not
            within ±2^63, a label not allowed or missing.
    """
    return _examples(_read(existing(path)), label, group, target)


def _examples(table: Table, label: str, group: str, target: str) -> Examples:
    y, classes, used = _targets(table, label, target)
    of_group, groups = _groups(table, group)
    features = table.rows.drop(columns=[*used, *([group] if group and group not in used else [])])
    if features.columns.empty:
        raise SourceError(f"{table.path}: no column is left beside the label {shown(label)}")
    x = _numbers(table, features)
    return Examples(x, y, classes, of_group, groups, columns=tuple(features.columns))


def parquet(
    path: str | Path, label: str, group: str, memory_gb: float, target: str = "class"
) -> Examples:
    """The same of Parquet files.

    What is larger than ``memory_gb`` (2^30 bytes) is read when a batch needs it. Rows at random are
    read from a row group each, so these are decoded once, one after the other, into a file that is
    mapped.
    """
    from pyarrow.parquet import ParquetFile

    root = existing(path)
    files = _files(root, ".parquet")
    parts = []
    for file in files:
        with reading_as(file, "a table"):
            parts.append(ParquetFile(file))
    names = parts[0].schema_arrow.names
    if 4 * len(names) * sum(part.metadata.num_rows for part in parts) <= memory_gb * 2**30:
        return _examples(_read(root, kind=".parquet"), label, group, target)
    table = _read(
        root,
        kind=".parquet",
        columns=[name for name in names if name in (label, group) or name in label],
    )
    y, classes, used = _targets(table, label, target)
    of_group, groups = _groups(table, group)
    features = tuple(name for name in names if name not in (*used, group))
    if not features:
        raise SourceError(f"{table.path}: no column is left beside the label {shown(label)}")
    rows = Rows(_decoded(root, files, features), len(y), len(features))
    return Examples(
        all_examples(rows, (len(features),)), y, classes, of_group, groups, columns=features
    )


class Rows:
    """Reads rows of a file that holds a table of float32."""

    def __init__(self, file: Path, rows: int, columns: int) -> None:
        self._file, self._shape = file, (rows, columns)

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(_opened(self._file, self._shape)[rows.numpy()]), None


@lru_cache(maxsize=4)
def _opened(
    file: Path, shape: tuple[int, int]
) -> "np.memmap[tuple[int, int], np.dtype[np.float32]]":
    return np.memmap(file, np.float32, "r", shape=shape)


def _decoded(root: Path, files: list[Path], features: Sequence[str]) -> Path:
    """The file that holds the features of all files; written unless it is there."""
    from pyarrow.parquet import ParquetFile

    folder = cache_folder("decoded").expanduser()
    place = f"table-{digest([str(root.resolve()), features])}"
    found = folder / f"{place}-{digest([fingerprint(root), CODE])}.float32"
    if found.exists():
        return found
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        for old in folder.glob(f"{place}-*.float32"):
            old.unlink()
        for old in folder.glob(f"{place}-*/rows"):  # of a process that was killed
            if time.time() - old.stat().st_mtime > ABANDONED_S:
                rmtree(old.parent)
        with TemporaryDirectory(prefix=f"{place}-", dir=folder) as partial:
            with Path(partial, "rows").open("wb") as written:
                for file in files:
                    for batch in ParquetFile(file).iter_batches(columns=list(features)):
                        rows = batch.to_pandas()
                        of_file = np.zeros(len(rows), np.int64)
                        _numbers(
                            Table(shown(str(file)), rows, [file], of_file), rows
                        ).numpy().tofile(written)
            Path(partial, "rows").rename(found)
    except OSError as error:
        raise SourceError(
            f"{shown(str(root))} exceeds data.memory-gb and cannot be decoded into "
            f"{shown(str(folder))}: {error}"
        ) from error
    return found


def unlabelled(path: str | Path, columns: Sequence[str], kind: str = ".csv") -> Tensor:
    """The ``columns`` of a table, or a folder of tables, [n, columns]; others are not looked at.

    Raises:
        SourceError: as of :func:`csv`; or a column is not there.
    """
    table = _read(existing(path), fewest=1, kind=kind)
    if missing := [name for name in columns if name not in table.rows]:
        raise SourceError(
            f"{table.path}: there are no columns {listed(missing)}; columns: {table.columns}"
        )
    return _numbers(table, table.rows[list(columns)])


def _numbers(table: Table, features: pd.DataFrame) -> Tensor:
    text = [
        str(name)
        for name, kind in features.dtypes.items()
        if not pd.api.types.is_numeric_dtype(kind)
    ]
    if text:
        problem = f"{table.path}: columns {listed(text)} are not numeric"
        raise SourceError(f"{problem}: turn them into numbers or leave them out")
    with np.errstate(over="ignore"):  # what a float32 cannot hold becomes infinite
        x = features.to_numpy(np.float32, na_value=np.nan, copy=True)
    if (large := np.argwhere(np.abs(x) > LARGEST)).size:
        row, column = large[0]
        file, name = str(table.files[int(table.file[row])]), str(features.columns[column])
        raise SourceError(
            f"{shown(file)}: column {shown(name)} holds a value that is not within ±2^63"
        )
    return torch.from_numpy(x)


def text_csv(path: str | Path, label: str, group: str, text_buckets: int) -> Examples:
    """Texts in a column ``text``, as hashed bags of words and word pairs.

    [n, text_buckets] float16, each with a mean square of 1, like pictures and standardised tables:
    of Euclidean norm 1 they would be so small that a network stays where it starts. ``label`` and
    ``group`` as in :func:`csv`.
    """
    table = _read(existing(path))
    bags = _bags(table, text_buckets)
    y, classes, _ = _labels(table, label)
    return Examples(bags, y, classes, *_groups(table, group))


def unlabelled_text(path: str | Path, text_buckets: int) -> Tensor:
    """The texts of a table as :func:`text_csv` has them."""
    return _bags(_read(existing(path), fewest=1), text_buckets)


def texts(
    path: Path, group: str
) -> tuple[list[str], Tensor | None, tuple[str, ...], Tensor | None]:
    """Texts in a column ``text``, the natural site of each, and the names of these sites.

    Also, which texts are the official test part. ``group`` as in :func:`csv`; files named ``train``
    and ``test`` are no natural sites but the official parts.
    """
    table = _read(path)
    test, _ = split_off([(file.stem,) for file in table.files])
    sites = (None, ()) if test is not None and not group else _groups(table, group)
    return list(_texts(table)), *sites, None if test is None else test[torch.from_numpy(table.file)]


def _texts(table: Table) -> pd.Series:
    if "text" not in table.rows:
        raise SourceError(f"{table.path}: there is no column 'text'; columns: {table.columns}")
    return table.rows["text"].fillna("").astype(str)


def _bags(table: Table, text_buckets: int) -> Tensor:
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=text_buckets, ngram_range=(1, 2), dtype=np.float32)
    bags = hashing.transform(_texts(table))
    return torch.from_numpy(bags.toarray() * text_buckets**0.5).half()


def _files(path: Path, kind: str) -> list[Path]:
    files = sorted(path.glob(f"*{kind}")) if path.is_dir() else [path]
    if not files:
        raise SourceError(f"{shown(str(path))}: no file ends in {kind}")
    return files


def _read(
    path: Path, fewest: int = FEWEST, kind: str = ".csv", columns: list[str] | None = None
) -> Table:
    files, tables = _files(path, kind), []
    for file in files:
        with reading_as(file, "a table"):
            if kind == ".csv":
                # Of a first row longer than the header pandas would take the first field for the
                # row's name, and move the others by one column. A row longer than one before is an
                # error.
                pd.read_csv(file, header=None, nrows=2, dtype=str)
                tables.append(pd.read_csv(file, low_memory=False))
            else:
                tables.append(pd.read_parquet(file, columns=columns))
        if list(tables[-1].columns) != list(tables[0].columns):
            differing = set(map(str, tables[-1].columns)) ^ set(map(str, tables[0].columns))
            difference = listed(sorted(differing)) or "their order"
            raise SourceError(
                f"{shown(str(file))} has other columns than {shown(str(files[0]))}: {difference}"
            )
        if len(tables[-1]) == 0:
            raise SourceError(f"{shown(str(file))} has no rows")
    rows = pd.concat(tables, ignore_index=True)
    if len(rows) < fewest:
        raise SourceError(
            f"{shown(str(path))}: 1 row is too few: at least {FEWEST}, to train on and to test on"
        )
    return Table(
        shown(str(path)),
        rows,
        files,
        np.repeat(np.arange(len(files)), [len(table) for table in tables]),
    )


def _labels(table: Table, label: str) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """Class indices, class names, and the columns that the label was made of."""
    values, used = _column(table, label)
    codes, different = pd.factorize(values, sort=True)
    if wrong := too_many(len(different)) or fault(names := [str(name) for name in different]):
        numbers = too_many(len(different)) and pd.api.types.is_numeric_dtype(values)
        task = "; to predict a number: training.task = 'regression'" if numbers else ""
        raise SourceError(f"data.label = {shown(label)} of {table.path}: {wrong}{task}")
    return torch.from_numpy(codes.astype(np.int64)), tuple(names), used


def _targets(table: Table, label: str, target: str) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """The targets to predict, their names, and the columns that they were made of."""
    return _labels(table, label) if target == "class" else _several(table, label, target)


def _several(table: Table, label: str, target: str) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """Numbers or labels [rows, k], their names, and the columns that they were made of."""
    names = [label] if label in table.rows else [each.strip() for each in label.split(",")]
    columns, used = [], list[str]()
    for name in names:
        values, of = _column(table, name)
        if not (pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)):
            wrong = int(pd.to_numeric(values, errors="coerce").isna().sum())
            problem = f"is not numeric, as training.task needs it, in {wrong} of {len(values)} rows"
            raise SourceError(f"data.label = {shown(name)} of {table.path} {problem}")
        if target == "labels" and not bool(values.isin([0, 1]).all()):
            raise SourceError(
                f"data.label = {shown(name)} of {table.path} holds more than 0 and 1, "
                "as training.task needs it"
            )
        columns.append(values.to_numpy(np.float32))
        used += of
    y = torch.from_numpy(np.stack(columns, 1))
    return y.to(torch.uint8) if target == "labels" else y, tuple(names), used


def _column(table: Table, label: str) -> tuple["pd.Series[Any]", list[str]]:
    """A column, or what an expression makes of some, without gaps.

    Also the columns that it was made of.
    """
    setting = f"data.label = {shown(label)}"
    if label in table.rows:
        values, used = table.rows[label], [label]
    else:
        try:
            values, used = evaluate(label, table.rows)
        except ExpressionError as error:
            wrong = f"{setting} is no column of {table.path} and no expression of its columns"
            if len(several := re.split(r"[ ,]+", label.strip())) > 1 and all(
                name in table.rows for name in several
            ):
                how = (
                    f"data.label = {', '.join(several)!r} with training.task = 'multi-label' or "
                    "'regression'"
                )
                raise SourceError(f"{wrong}; to predict several columns: {how}") from error
            raise SourceError(f"{wrong}: {table.columns}; {error}; {ALLOWED}") from error
    # Of a missing value a comparison makes no: what is not known would be learnt as known.
    if missing := int((values.isna() | table.rows[used].isna().any(axis=1)).sum()):
        raise SourceError(f"{setting}: {missing} rows of {table.path} have none")
    return values, used


def _groups(table: Table, group: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """The natural site of each row: what its column ``group`` holds, or its file of several."""
    if group and group not in table.rows:
        raise SourceError(
            f"data.group = {shown(group)} is no column of {table.path}: {table.columns}"
        )
    if not group and len(table.files) == 1:
        return None, ()
    names = (
        table.rows[group].astype(str)
        if group
        else pd.Series([file.stem for file in table.files])[table.file]
    )
    codes, groups = pd.factorize(names, sort=True)
    if wrong := fault(list(groups)):
        setting = f"data.group = {shown(group)}" if group else f"{table.path}, files as sites"
        raise SourceError(f"{setting}: {wrong}")
    return torch.from_numpy(codes.astype(np.int64)), tuple(groups)
