"""Folders of pictures and of sounds: a folder a class."""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from math import gcd, inf, prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from datasets.errors import SourceError
from datasets.examples import Examples
from datasets.files import existing, reading_as, split_off
from datasets.lazy import all_examples
from datasets.names import fault, shown, too_many

PICTURES = {  # what Pillow may take a file for: one other of its formats starts Ghostscript
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
FORMATS = sorted(set(PICTURES.values()))
MOST_PIXELS = 2**26  # of a picture before it is resized: 200 MB while it is decoded
# Of the log-mel spectrogram, at 8 kHz: 32 ms every 16 ms.
SAMPLE_RATE, WINDOW, HOP, MELS = 8000, 256, 128, 40
RATES = 1000, 384_000  # Hz, of WAV files
LONGEST_CLIP = 3600.0  # seconds


GREY = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's names
PROGRESS_S = 10.0  # from one line of a progress bar to the next


class Files(NamedTuple):
    """Files by class and, where they have one, by natural site and official part.

    The fields are as in :class:`Examples`.
    """

    files: list[Path]
    y: Tensor
    classes: tuple[str, ...]
    group: Tensor | None
    groups: tuple[str, ...]
    test: Tensor | None


def image_folder(
    path: str | Path, group: str, image_size: int, channels: int, memory_gb: float = inf
) -> Examples:
    """Pictures under ``path``, one folder a class, as uint8 [n, channels, image_size, image_size].

    16 bits become 8; transparency is left out. ``channels``: 1 grey, 3 coloured, 0 as they are:
    grey if all of them are. ``group`` as in :func:`by_class`. What is larger than ``memory_gb``
    (2^30 bytes) is read when a batch needs it.

    Raises:
        SourceError: a file is no picture, damaged, or too large; it is named.
    """
    found = by_class(existing(path), group, tuple(PICTURES))
    shape = channels, image_size, image_size
    if len(found.files) * (channels or 3) * image_size**2 > memory_gb * 2**30:
        shape = channels or _channels(found.files), image_size, image_size
        return Examples(all_examples(Pictures(found.files, shape), shape), *found[1:])
    return Examples(pictures(found.files, shape), *found[1:])


class Pictures:
    """Reads pictures, uint8 of ``shape`` [channels, height, width]."""

    def __init__(self, files: Sequence[Path], shape: tuple[int, int, int]) -> None:
        self._files, self._shape = files, shape

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, None]:
        return pictures([self._files[row] for row in rows.tolist()], self._shape), None


def _channels(files: Sequence[Path]) -> int:
    """1 if all pictures are grey, by their first bytes; else 3."""
    for file in files:
        with reading_as(file, "a picture"), Image.open(file, formats=FORMATS) as picture:
            if picture.mode not in GREY:
                return 3
    return 1


def pictures(files: Sequence[Path], shape: Sequence[int]) -> Tensor:
    """Pictures as uint8 [n, channels, height, width], resized; channels as in :func:`image_folder`.

    Several are decoded at once; where it takes long, how far it is stands on standard error.

    Raises:
        SourceError: a file is no picture, damaged, or too large; it is named.
    """
    from torchvision.transforms.functional import resize, rgb_to_grayscale

    found = torch.empty(len(files), 1 if shape[0] == 1 else 3, *shape[1:], dtype=torch.uint8)

    def read(number: int) -> bool:
        with reading_as(files[number], "a picture"):
            pixels, grey = decode(files[number])
            decoded = rgb_to_grayscale(pixels) if shape[0] == 1 else pixels
            found[number] = resize(decoded, list(shape[1:]), antialias=True)
        return grey

    with ThreadPoolExecutor(1 if get_worker_info() else os.cpu_count()) as pool:
        progress = tqdm(
            pool.map(read, range(len(files))),
            "pictures",
            len(files),
            delay=PROGRESS_S,
            mininterval=PROGRESS_S,
            unit="",
        )
        try:
            greys = list(progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found[:, :1].clone() if shape[0] == 0 and all(greys) else found


def decode(file: Path) -> tuple[Tensor, bool]:
    """A picture as uint8 [3, height, width], and whether it is grey.

    For a damaged one, whatever Pillow raises is raised.
    """
    data = file.read_bytes()
    with Image.open(BytesIO(data), formats=FORMATS) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels, at most {MOST_PIXELS} are allowed"
            )
        picture.verify()
    if data.startswith(b"\x89PNG"):
        _check_png(data)
    with Image.open(BytesIO(data), formats=FORMATS) as picture:
        grey_mode = picture.mode in GREY
        if picture.mode.startswith("I;16"):  # grey, 16 bits: Pillow would cut off what is above 255
            grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
            pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
        elif picture.mode in ("I", "F"):
            raise ValueError("32 bits a pixel, whose largest value nobody tells; allowed: 8 and 16")
        else:
            pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1), grey_mode


def _check_png(data: bytes) -> None:
    """Refuse a PNG that ends before its last row.

    Pillow takes what lacks for black; torchvision reads beyond its memory and ends the process.
    """
    width, height, depth, kind, interlaced = struct.unpack(">IIBBxxB", data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    # Adam7: first column, first row, and the steps from one to the next, of each of its passes.
    adam7 = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    promised = 0
    for left, top, right, down in adam7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        promised += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    inflate, held, position = zlib.decompressobj(), 0, 8
    while position < len(data) and held < promised:
        length, chunk = struct.unpack_from(">I4s", data, position)
        if chunk == b"IDAT":
            held += len(
                inflate.decompress(data[position + 8 : position + 8 + length], promised - held)
            )
        position += 12 + length
    if held < promised:
        raise ValueError("it ends before its last row")


def audio_folder(
    path: str | Path, group: str, audio_seconds: float, memory_gb: float = inf
) -> Examples:
    """WAV files under ``path``, one folder a class, as log-mel spectrograms [n, 1, 40, frames].

    Clips are cut or padded to ``audio_seconds``; ``group`` as in :func:`by_class`, ``memory_gb`` as
    in :func:`image_folder`.

    Raises:
        SourceError: a file is no WAV file, has a rate out of bounds or samples that are not finite;
            it is named.
    """
    shortest = WINDOW / SAMPLE_RATE
    if not shortest <= audio_seconds <= LONGEST_CLIP:
        raise SourceError(
            f"data.audio-seconds = {audio_seconds}: allowed: {shortest} to {LONGEST_CLIP}"
        )
    found = by_class(existing(path), group, (".wav",))
    shape = 1, MELS, int(audio_seconds * SAMPLE_RATE) // HOP + 1
    if 4 * len(found.files) * prod(shape) > memory_gb * 2**30:
        return Examples(all_examples(Sounds(found.files, audio_seconds), shape), *found[1:])
    return Examples(spectrograms(found.files, audio_seconds), *found[1:])


class Sounds:
    """Reads WAV files, as spectrograms [1, 40, frames]."""

    def __init__(self, files: Sequence[Path], audio_seconds: float) -> None:
        self._files, self._seconds = files, audio_seconds

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, None]:
        return spectrograms([self._files[row] for row in rows.tolist()], self._seconds), None


def spectrograms(files: Sequence[Path], audio_seconds: float) -> Tensor:
    """WAV files as log-mel spectrograms [n, 1, 40, frames].

    Raises:
        SourceError: as of :func:`audio_folder`.
    """
    clips = torch.zeros(len(files), int(audio_seconds * SAMPLE_RATE))
    for clip, file in zip(clips, files, strict=True):
        with reading_as(file, "a WAV file"):
            wave = _wave(file)
            length = min(len(wave), len(clip))
            clip[:length] = wave[:length]
    features = log_mel(clips).unsqueeze(1)
    if len(bad := (~features.isfinite()).flatten(1).any(1).nonzero()):
        raise SourceError(f"{shown(str(files[int(bad[0])]))}: samples are not finite, or too large")
    return features


def _wave(file: Path) -> Tensor:
    """The samples [n] of a WAV file, of all its channels together, at 8 kHz."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    rate, samples = wavfile.read(file)
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{rate} samples a second; allowed: {RATES[0]} to {RATES[1]}")
    wave = samples.astype(np.float32)
    if np.issubdtype(samples.dtype, np.integer):
        wave = (
            (wave - 128) / 128 if samples.dtype == np.uint8 else wave / np.iinfo(samples.dtype).max
        )
    if wave.ndim == 2:
        wave = wave.mean(1)
    if rate != SAMPLE_RATE:
        common = gcd(rate, SAMPLE_RATE)
        wave = resample_poly(wave, SAMPLE_RATE // common, rate // common)
    return torch.from_numpy(wave)


def log_mel(waves: Tensor) -> Tensor:
    """Log-mel spectrograms [n, 40, frames] of ``waves`` [n, samples] at 8 kHz.

    Each clip has mean 0 and deviation 1. Triangular filters, evenly spaced on the mel scale
    2595 log10(1 + f / 700). torchaudio would do this, but it stands still at the torch release
    before last.
    """
    window = torch.hann_window(WINDOW)
    # [n, WINDOW / 2 + 1, frames]
    power = torch.stft(waves, WINDOW, HOP, window=window, return_complex=True).abs().square()
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = torch.from_numpy(700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)).float()
    bins = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)  # [MELS, WINDOW / 2 + 1]
    loud = torch.log(filters @ power + 1e-6)
    return (loud - loud.mean((1, 2), keepdim=True)) / (loud.std((1, 2), keepdim=True) + 1e-6)


SEARCH = """
import json, re, sys
pattern, paths = json.load(sys.stdin)
try:
    found = [match and match[1] for match in map(re.compile(pattern).search, paths)]
except (re.error, IndexError) as error:
    found = str(error)
json.dump(found, sys.stdout)
"""


def by_class(root: Path, group: str, endings: Sequence[str]) -> Files:
    """Files under ``root`` by class, natural site and official part.

    ``CLASS/file``, ``SITE/CLASS/file``, or ``CLASS/images/file`` where all lowest folders have one
    name; each of these may lie below ``train/`` and ``test/`` (or ``val/``), the official parts.
    The natural site is also what the first bracket of the regular expression ``group`` finds in the
    path below ``root``.

    Raises:
        SourceError: no files, files outside of a folder or at different depths, names that must not
            leave a site, or a ``group`` that is no regular expression, finds nothing in a path, or
            takes too long.
    """
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in endings)
    if not files:
        raise SourceError(f"{shown(str(root))}: no file ends in {', '.join(endings)}")
    paths = [file.relative_to(root).as_posix() for file in files]
    places = [path.split("/")[:-1] for path in paths]  # the folders of each file
    test, places = split_off(places)
    if loose := [file for file, place in zip(files, places, strict=True) if not place]:
        raise SourceError(f"{shown(str(loose[0]))} lies in no folder, which would name its class")
    deep = min(map(len, places)) > 1
    if deep and len({place[-1] for place in places}) == 1:
        places = [place[:-1] for place in places]
        deep = min(map(len, places)) > 1
    if not group and len({len(place) > 1 for place in places}) == 2:
        by_depth = {len(place): path for place, path in zip(places, paths, strict=True)}
        ends = f"{shown(by_depth[min(by_depth)])} and {shown(by_depth[max(by_depth)])}"
        raise SourceError(
            f"{shown(str(root))}: is it CLASS/file or SITE/CLASS/file? "
            f"{ends} lie at different depths"
        )
    classes, y = _index(place[-1] for place in places)
    if wrong := too_many(len(classes)) or fault(classes):
        raise SourceError(f"{shown(str(root))}, folders as classes: {wrong}")
    of_group, groups = natural_sites(
        root, group, paths, [place[0] for place in places] if deep else None
    )
    return Files(files, y, classes, of_group, groups, test)


def natural_sites(
    root: Path, group: str, paths: Sequence[str], names: Sequence[str] | None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The natural site of each of the ``paths`` below ``root``.

    It is what ``group`` finds there or, without it, as in ``names``.
    """
    if group:
        setting, names = f"data.group = {shown(group)}", _search(group, paths)
    elif names is None:
        return None, ()
    else:
        setting = f"{shown(str(root))}, files and folders as sites"
    groups, of_group = _index(names)
    if wrong := fault(groups):
        raise SourceError(f"{setting}: {wrong}")
    return of_group, groups


def _search(group: str, paths: Sequence[str]) -> list[str]:
    """What the first bracket of ``group`` finds in each path.

    In a process of its own, which can be ended: a run's author writes the expression, and some
    take for ever.
    """
    setting, seconds = f"data.group = {shown(group)}", 2 + len(paths) / 1000
    command = [sys.executable, "-I", "-S", "-c", SEARCH]
    try:
        text = json.dumps([group, paths])
        run = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=seconds, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(
            f"{setting} takes too long: more than {seconds:.0f} s for {len(paths)} paths"
        ) from error
    except subprocess.CalledProcessError as error:
        raise SourceError(
            f"{setting} cannot be searched for: {error.stderr[-200:].strip()}"
        ) from error
    found = json.loads(run.stdout)
    if isinstance(found, str):
        raise SourceError(f"{setting}: a regular expression with one bracket is expected: {found}")
    if None in found:
        raise SourceError(f"{setting} finds nothing in {shown(paths[found.index(None)])}")
    return [str(name) for name in found]


def _index(names: Iterable[str]) -> tuple[tuple[str, ...], Tensor]:
    """The different names in order, and each name's position among them."""
    codes, different = pd.factorize(np.array(list(names), dtype=object), sort=True)
    return tuple(str(name) for name in different), torch.from_numpy(codes.astype(np.int64))
