"""Where examples come from: every source decodes a data set once, into tensors.

Pictures stay bytes (uint8) until a batch is made of them; tables keep NaN where a value is missing, for the site to fill.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

PICTURE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
SAMPLE_RATE, WINDOW, HOP, MELS = 8000, 256, 128, 40  # of the log-mel spectrogram, at 8 kHz: 32 ms every 16 ms


class SourceError(ValueError):
    """The data cannot be read; the message names the path or column and what was expected."""


class Examples(NamedTuple):
    """A data set in memory. A function of the user's own returns one of these; only the first three are needed.

    Attributes:
        x: [n, channels, height, width] pictures, uint8 from 0 to 255 or float; or [n, features], float.
        y: [n] int64, indices into ``classes``.
        classes: names of the classes.
        group: [n] int64, the natural site of each example, or None.
        groups: names of the natural sites.
        test: [n] bool, the official test part, or None where the data set has none.
        columns: names of the features of a table, which is standardised before use and may hold NaN; else empty.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    group: Tensor | None = None
    groups: tuple[str, ...] = ()
    test: Tensor | None = None
    columns: tuple[str, ...] = ()


def load(source: str, path: str, *, label: str, group: str, image_size: int, audio_seconds: float, text_buckets: int) -> Examples:
    """Read a data set by the name of its source; the arguments are the run configuration's of the same names.

    Raises:
        SourceError: what is missing, and where it was looked for.
    """
    match source:
        case "digits":
            return digits()
        case "mnist" | "fashion-mnist" | "cifar10" | "cifar100":
            return torchvision_set(source, path)
        case "image-folder":
            return image_folder(_existing(path), group, image_size)
        case "audio-folder":
            return audio_folder(_existing(path), group, audio_seconds)
        case "csv":
            return csv(_existing(path), label, group)
        case "text-csv":
            return text_csv(_existing(path), label, group, text_buckets)
    module, _, function = source.partition(":")
    try:
        read: Callable[[str], Examples] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SourceError(f"data = {source!r}: {error}") from error
    return check(read(path), source)


def check(examples: Examples, source: str) -> Examples:
    """Refuse a data set of the user's own that training would stumble over.

    Raises:
        SourceError: what does not fit together.
    """
    if not isinstance(examples, Examples):
        raise SourceError(f"data = {source!r} must return datasets.sources.Examples, it returned {type(examples).__name__}")
    n = len(examples.y)
    if len(examples.x) != n or n == 0 or examples.y.dtype != torch.int64:
        raise SourceError(
            f"data = {source!r}: x and y must hold the same number of examples, at least one, and y must be int64; "
            f"got {tuple(examples.x.shape)} and {tuple(examples.y.shape)} of {examples.y.dtype}"
        )
    if not 0 <= int(examples.y.min()) <= int(examples.y.max()) < len(examples.classes):
        raise SourceError(f"data = {source!r}: y must lie between 0 and {len(examples.classes) - 1}")
    return examples


def digits() -> Examples:
    """scikit-learn's handwritten digits: 1,797 grey pictures of 8 x 8, in the package, no download."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return Examples(x, torch.from_numpy(bunch.target).long(), tuple(str(name) for name in bunch.target_names))


def torchvision_set(source: str, root: str) -> Examples:
    """MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100 by torchvision, with the official test part marked.

    Looked for under ``root`` (by default ``~/.cache/archipelago``) and downloaded there where it is missing.
    """
    from torchvision import datasets as known

    build = {
        "mnist": known.MNIST,
        "fashion-mnist": known.FashionMNIST,
        "cifar10": known.CIFAR10,
        "cifar100": known.CIFAR100,
    }[source]
    folder = Path(root).expanduser() if root else Path("~/.cache/archipelago").expanduser()
    parts = []
    for train in (True, False):
        try:
            parts.append(build(folder, train=train, download=False))
        except RuntimeError:
            try:
                parts.append(build(folder, train=train, download=True))
            except (OSError, RuntimeError) as error:
                raise SourceError(
                    f"data = {source!r} is not under {folder} and could not be downloaded ({error}): "
                    "copy it there in torchvision's layout, or name its folder with data-path"
                ) from error
    pictures = [torch.as_tensor(part.data) for part in parts]
    x = torch.cat([each.unsqueeze(1) if each.dim() == 3 else each.permute(0, 3, 1, 2) for each in pictures]).contiguous()
    y = torch.cat([torch.as_tensor(part.targets) for part in parts]).long()
    test = torch.arange(len(y)) >= len(pictures[0])
    return Examples(x, y, tuple(parts[0].classes), test=test)


def image_folder(root: Path, group: str, size: int) -> Examples:
    """Pictures under ``root``, one folder a class, resized to ``size`` x ``size`` colours; ``group`` as in :func:`_by_class`."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.functional import resize

    files, y, classes, of_group, groups = _by_class(root, group, PICTURE_FILES)
    pictures = []
    for file in files:
        try:
            pictures.append(resize(decode_image(str(file), ImageReadMode.RGB), [size, size], antialias=True))
        except RuntimeError as error:
            raise SourceError(f"{file} is not a picture that can be read: {error}") from error
    return Examples(torch.stack(pictures), y, classes, of_group, groups)


def audio_folder(root: Path, group: str, seconds: float) -> Examples:
    """WAV files under ``root``, one folder a class, as log-mel spectrograms [1, 40, frames]; ``group`` as in :func:`_by_class`."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    files, y, classes, of_group, groups = _by_class(root, group, (".wav",))
    clips = torch.zeros(len(files), int(seconds * SAMPLE_RATE))
    for clip, file in zip(clips, files, strict=True):
        try:
            rate, samples = wavfile.read(file)
        except ValueError as error:
            raise SourceError(f"{file} is not a WAV file that can be read: {error}") from error
        wave = samples.astype(np.float32)
        if np.issubdtype(samples.dtype, np.integer):
            wave = (wave - 128) / 128 if samples.dtype == np.uint8 else wave / np.iinfo(samples.dtype).max
        if wave.ndim == 2:
            wave = wave.mean(1)
        if rate != SAMPLE_RATE:
            common = gcd(rate, SAMPLE_RATE)
            wave = resample_poly(wave, SAMPLE_RATE // common, rate // common)
        length = min(len(wave), len(clip))
        clip[:length] = torch.from_numpy(wave[:length])
    return Examples(log_mel(clips).unsqueeze(1), y, classes, of_group, groups)


def log_mel(waves: Tensor) -> Tensor:
    """Log-mel spectrograms [n, 40, frames] of ``waves`` [n, samples] at 8 kHz, each clip with mean 0 and deviation 1.

    Triangular filters, evenly spaced on the mel scale 2595 log10(1 + f / 700). torchaudio would do this, but it stands still at
    the torch release before last.
    """
    window = torch.hann_window(WINDOW)
    power = torch.stft(waves, WINDOW, HOP, window=window, return_complex=True).abs().square()  # [n, WINDOW / 2 + 1, frames]
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = torch.from_numpy(700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)).float()
    bins = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)  # [MELS, WINDOW / 2 + 1]
    loud = torch.log(filters @ power + 1e-6)
    return (loud - loud.mean((1, 2), keepdim=True)) / (loud.std((1, 2), keepdim=True) + 1e-6)


def csv(path: Path, label: str, group: str) -> Examples:
    """A table, or a folder of tables with the same columns: numeric features, a label, missing values left as NaN.

    ``label`` is a column or an expression of pandas (``"target > 0"``); ``group`` a column, or empty: a folder's files are the
    natural sites.
    """
    table = _read_tables(path)
    y, classes, used = _labels(table, label, path)
    of_group, groups = _groups(table, group, path)
    features = table.drop(columns=[*used, *([group] if group else []), "__file__"])
    text = [name for name in features.columns if not pd.api.types.is_numeric_dtype(features[name])]
    if text:
        raise SourceError(f"{path}: columns {', '.join(text)} are not numeric: turn them into numbers or leave them out")
    if features.columns.empty:
        raise SourceError(f"{path}: no column is left beside the label {label!r}")
    x = torch.from_numpy(features.to_numpy(np.float32, na_value=np.nan))
    return Examples(x, y, classes, of_group, groups, columns=tuple(str(name) for name in features.columns))


def text_csv(path: Path, label: str, group: str, buckets: int) -> Examples:
    """Texts in a column ``text``, as hashed bags of words and word pairs: [n, buckets] float16, each of Euclidean norm 1."""
    from sklearn.feature_extraction.text import HashingVectorizer

    table = _read_tables(path)
    if "text" not in table:
        raise SourceError(f"{path}: there is no column 'text'; columns: {', '.join(map(str, table.columns[:-1]))}")
    y, classes, _ = _labels(table, label, path)
    of_group, groups = _groups(table, group, path)
    hashing = HashingVectorizer(n_features=buckets, ngram_range=(1, 2), dtype=np.float32)
    bags = hashing.transform(table["text"].fillna("").astype(str))
    return Examples(torch.from_numpy(bags.toarray()).half(), y, classes, of_group, groups)


def _existing(path: str) -> Path:
    if not path:
        raise SourceError("data-path = '': this source needs a file or folder")
    found = Path(path).expanduser()
    if not found.exists():
        raise SourceError(f"data-path = {path!r}: there is no such file or folder")
    return found


def _by_class(
    root: Path, group: str, endings: Sequence[str]
) -> tuple[list[Path], Tensor, tuple[str, ...], Tensor | None, tuple[str, ...]]:
    """Files under ``root`` by class, the name of the folder they lie in, and by natural site.

    The natural site is what the first bracket of the regular expression ``group`` finds in the path below ``root``; without one,
    the top folder of ``root/SITE/CLASS/file``.
    """
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in endings)
    if not files:
        raise SourceError(f"{root}: no file ends in {', '.join(endings)}")
    classes, y = _index(file.parent.name for file in files)
    paths = [file.relative_to(root).as_posix() for file in files]
    if group:
        try:
            found = [re.search(group, path) for path in paths]
            names = [match.group(1) for match in found if match]
        except (re.error, IndexError) as error:
            raise SourceError(f"group = {group!r}: a regular expression with one bracket is expected: {error}") from error
        if len(names) < len(paths):
            lost = next(path for path, match in zip(paths, found, strict=True) if not match)
            raise SourceError(f"group = {group!r} finds nothing in {lost!r}")
    elif all(path.count("/") >= 2 for path in paths):
        names = [path.split("/")[0] for path in paths]
    else:
        return files, y, classes, None, ()
    groups, of_group = _index(names)
    return files, y, classes, of_group, groups


def _index(names: Iterable[str]) -> tuple[tuple[str, ...], Tensor]:
    """The different names in order, and each name's place among them."""
    codes, different = pd.factorize(np.array(list(names), dtype=object), sort=True)
    return tuple(str(name) for name in different), torch.from_numpy(codes.astype(np.int64))


def _read_tables(path: Path) -> pd.DataFrame:
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise SourceError(f"{path}: no file ends in .csv")
    try:
        tables = [pd.read_csv(file).assign(__file__=file.stem) for file in files]
    except (ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not a table that can be read: {error}") from error
    for file, table in zip(files, tables, strict=True):
        if list(table.columns) != list(tables[0].columns):
            raise SourceError(f"{file} has other columns than {files[0]}")
    return pd.concat(tables, ignore_index=True)


def _labels(table: pd.DataFrame, label: str, path: Path) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """Class indices, class names, and the columns that the label was made of."""
    try:
        values = pd.Series(table[label] if label in table else table.eval(label))
    except (KeyError, ValueError, SyntaxError, TypeError, NameError) as error:
        columns = ", ".join(map(str, table.columns[:-1]))
        raise SourceError(f"label = {label!r} is no column of {path} and no expression of its columns: {columns}") from error
    if values.isna().any():
        raise SourceError(f"label = {label!r}: {int(values.isna().sum())} rows of {path} have none")
    used = [name for name in table.columns if re.search(rf"\b{re.escape(str(name))}\b", label)]
    codes, classes = pd.factorize(values, sort=True)
    return torch.from_numpy(codes.astype(np.int64)), tuple(str(name) for name in classes), used


def _groups(table: pd.DataFrame, group: str, path: Path) -> tuple[Tensor | None, tuple[str, ...]]:
    if group and group not in table:
        raise SourceError(f"group = {group!r} is no column of {path}: {', '.join(map(str, table.columns[:-1]))}")
    names = table[group or "__file__"].astype(str)
    if not group and names.nunique() == 1:
        return None, ()
    groups, of_group = _index(names)
    return of_group, groups
