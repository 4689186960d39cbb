"""Files that are damaged, hostile or unusual: read, or refused by name; never the process's end."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.io import wavfile

from datasets import folders
from datasets.sources import Examples, SourceError, load

COLOURS = {0: 1, 2: 3, 4: 2, 6: 4}  # kinds of PNG, and the samples a pixel has


def read(source: str, path: Path, **changes: Any) -> Examples:
    arguments: dict[str, Any] = {
        "label": "label",
        "group": "",
        "image_size": 8,
        "audio_seconds": 0.5,
        "text_buckets": 64,
    } | changes
    return load(source, str(path), **arguments)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, kind: int, raw: bytes, interlaced: bool = False
) -> bytes:
    """A PNG of filtered rows ``raw``, however few, with all its checksums right."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    rows = zlib.compress(raw)
    middle = len(rows) // 2  # in two pieces, as large pictures have them
    data = chunk(b"IDAT", rows[:middle]) + chunk(b"IDAT", rows[middle:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def adam7(width: int, height: int, value: int) -> bytes:
    """The rows of an interlaced grey picture of one ``value``."""
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    raw = b""
    for left, top, right, down in passes:
        columns, rows = len(range(left, width, right)), len(range(top, height, down))
        raw += (b"\0" + bytes([value]) * columns) * rows if columns else b""
    return raw


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, each with a grey picture, and room for more."""
    for name, grey in (("cat", 250), ("dog", 5)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 12), (grey, grey, grey)).save(tmp_path / name / "good.png")
    return tmp_path


def refused(source: str, root: Path, file: str, **changes: Any) -> str:
    """What the error says, which names ``file``."""
    with pytest.raises(SourceError) as error:
        read(source, root, **changes)
    assert file in str(error.value)
    return str(error.value)


def read_or_refused(source: str, root: Path, file: str) -> Examples | None:
    """The examples, or None where an error names ``file``."""
    try:
        return read(source, root)
    except SourceError as error:
        message = str(error)
    assert file in message
    return None


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(6, 6), (64, 64), (33, 7), (1, 9), (300, 200)])
def test_png_with_fewer_rows_than_promised_is_refused(
    folder: Path, size: tuple[int, int], interlaced: bool
) -> None:
    """Torchvision's decoder ended the process with a segmentation fault."""
    width, height = size
    raw = adam7(width, height, 9) if interlaced else (b"\0" + b"\x09" * width) * height
    file = folder / "cat" / "short.png"
    file.write_bytes(png(width, height, 8, 0, raw, interlaced))
    assert len(read("image-folder", folder).y) == 3
    for lost in (1, width + 1, len(raw) - 1):
        file.write_bytes(png(width, height, 8, 0, raw[:-lost], interlaced))
        assert "before its last row" in refused("image-folder", folder, "short.png")


@pytest.mark.parametrize("kind", COLOURS)
@pytest.mark.parametrize("depth", [8, 16])
def test_png_of_any_kind_is_complete_with_all_its_rows(folder: Path, kind: int, depth: int) -> None:
    raw = (b"\0" + b"\x33" * (5 * COLOURS[kind] * depth // 8)) * 4
    (folder / "cat" / "other.png").write_bytes(png(5, 4, depth, kind, raw))
    examples = read("image-folder", folder)
    assert examples.x[1].unique().tolist() == [0x33]
    (folder / "cat" / "other.png").write_bytes(png(5, 4, depth, kind, raw[:-1]))
    refused("image-folder", folder, "other.png")


@pytest.mark.parametrize("ending", ["png", "tif", "tiff"])
def test_16_bits_a_pixel_are_scaled_to_8(folder: Path, ending: str) -> None:
    grey = np.full((8, 8), 200 * 257, dtype=np.uint16)
    grey[:, 4:] = 20 * 257 + 129
    Image.fromarray(grey).save(folder / "cat" / f"deep.{ending}")
    picture = read("image-folder", folder).x[0]
    assert picture.dtype == torch.uint8
    assert picture[:, :, :4].unique().tolist() == [200]
    assert picture[:, :, 4:].unique().tolist() == [21]


@pytest.mark.parametrize("ending", ["bmp", "tif", "tiff", "webp", "jpg", "JPEG", "png"])
def test_pictures_of_every_listed_ending_are_read(tmp_path: Path, ending: str) -> None:
    (tmp_path / "cat").mkdir()
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8], pixels[8:, :, 1] = (250, 0, 0), 250
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / "cat" / f"{name}.{ending}", quality=95)
    found = read("image-folder", tmp_path, image_size=16).x[0].int()
    expected = torch.from_numpy(pixels).permute(2, 0, 1).int()
    assert (found - expected).abs()[:, [0, 1, 2, 3, 12, 13, 14, 15]].max() <= 12  # of lossy formats


def test_grey_palette_and_transparent_pictures_become_colours(folder: Path) -> None:
    for number, mode in enumerate(("1", "L", "LA", "P", "RGBA", "CMYK")):
        ending = "tif" if mode == "CMYK" else "png"
        Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(
            folder / "cat" / f"{number}.{ending}"
        )
    assert read("image-folder", folder).x[:6].unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_pixel_are_refused(folder: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(folder / "cat" / "deep.tif")
    assert "allowed: 8 and 16" in refused("image-folder", folder, "deep.tif")


@pytest.mark.parametrize(
    "size", [(9000, 9000), (20_000, 20_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)]
)
def test_small_file_of_a_large_picture_is_refused_before_it_is_decoded(
    folder: Path, size: tuple[int, int]
) -> None:
    rows = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    (folder / "dog" / "bomb.png").write_bytes(data)
    assert "pixels" in refused("image-folder", folder, "bomb.png")


def test_data_beyond_the_last_row_are_not_unpacked(folder: Path) -> None:
    raw = (b"\0" + b"\x09" * 8) * 8
    (folder / "cat" / "long.png").write_bytes(png(8, 8, 8, 0, raw + bytes(10_000_000)))
    assert read("image-folder", folder).x[1].unique().tolist() == [9]


def test_files_of_other_kinds_under_the_name_of_a_picture_are_named(folder: Path) -> None:
    file = folder / "cat" / "other.png"
    frames = [Image.new("P", (4, 4), colour) for colour in (0, 1)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    refused("image-folder", folder, "other.png")
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(x) (w) file pop\n")
    refused("image-folder", folder, "other.png")
    file.write_bytes(b"")
    refused("image-folder", folder, "other.png")
    file.unlink()
    file.mkdir()
    assert "no regular file" in refused("image-folder", folder, "other.png")
    file.rmdir()
    os.mkfifo(file)
    assert "no regular file" in refused("image-folder", folder, "other.png")


def test_picture_in_no_folder_has_no_class(folder: Path) -> None:
    Image.new("L", (4, 4)).save(folder / "loose.png")
    assert "lies in no folder" in refused("image-folder", folder, "loose.png")


def damaged(data: bytes, cut: int, flips: dict[int, int]) -> bytes:
    changed = bytearray(data[: cut % (len(data) + 1)])
    for place, value in flips.items():
        if changed:
            changed[place % len(changed)] ^= value
    return bytes(changed)


HARM = {
    "cut": st.integers(0, 100_000) | st.just(0),
    "flips": st.dictionaries(st.integers(0, 100_000), st.integers(1, 255), max_size=4),
}
FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of some damage
@given(st.sampled_from(["png", "jpg", "bmp", "webp", "tif"]), HARM["cut"], HARM["flips"])
def test_damaged_picture_is_read_or_named(
    folder: Path, ending: str, cut: int, flips: dict[int, int]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    file = folder / "cat" / f"bad.{ending}"
    Image.fromarray(pixels).save(file)
    whole = file.read_bytes()
    file.write_bytes(damaged(whole, cut or len(whole), flips))
    if found := read_or_refused("image-folder", folder, f"bad.{ending}"):
        assert found.x.shape == (3, 3, 8, 8)
    file.unlink()


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    (tmp_path / "low").mkdir()
    for name in ("a", "b"):
        wavfile.write(
            tmp_path / "low" / f"{name}.wav",
            8000,
            (np.sin(np.arange(4000)) * 9000).astype(np.int16),
        )
    return tmp_path


def test_wav_cut_in_its_header_is_named(sounds: Path) -> None:
    file = sounds / "low" / "b.wav"
    whole = file.read_bytes()
    for length in range(44):
        file.write_bytes(whole[:length])
        refused("audio-folder", sounds, "b.wav")


@pytest.mark.parametrize("rate", [1, 999, 384_001, 2**31 - 1])
def test_wav_of_an_absurd_rate_is_named(sounds: Path, rate: int) -> None:
    wavfile.write(sounds / "low" / "b.wav", rate, np.ones(100, dtype=np.int16))
    assert "allowed: 1000 to 384000" in refused("audio-folder", sounds, "b.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_samples_that_are_not_finite_are_named(sounds: Path, value: float) -> None:
    samples: NDArray[np.float32] = np.zeros(4000, dtype=np.float32)
    samples[77] = value
    wavfile.write(sounds / "low" / "b.wav", 8000, samples)
    assert "samples are not finite" in refused("audio-folder", sounds, "b.wav")


@pytest.mark.parametrize("seconds", [1e-9, 0.01, 0.0319, 3601.0, 1e12])
def test_clips_shorter_than_a_window_or_longer_than_an_hour_are_refused(
    sounds: Path, seconds: float
) -> None:
    with pytest.raises(SourceError, match=r"data\.audio-seconds = .*: allowed: 0.032 to 3600"):
        read("audio-folder", sounds, audio_seconds=seconds)


def test_shortest_clip_is_one_window(sounds: Path) -> None:
    assert read("audio-folder", sounds, audio_seconds=0.032).x.shape == (2, 1, 40, 3)


@FUZZ
@pytest.mark.filterwarnings("ignore::scipy.io.wavfile.WavFileWarning")  # of some damage
@given(**HARM)
def test_damaged_wav_is_read_or_named(sounds: Path, cut: int, flips: dict[int, int]) -> None:
    file = sounds / "low" / "b.wav"
    wavfile.write(file, 8000, (np.sin(np.arange(300)) * 9000).astype(np.int16))
    flips = {place % 60: value for place, value in flips.items()}  # mostly in the header
    whole = file.read_bytes()
    file.write_bytes(damaged(whole, cut or len(whole), flips))
    if found := read_or_refused("audio-folder", sounds, "b.wav"):
        assert found.x.isfinite().all()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "fields"),
    [
        ("age,bp,label\n30,100,0,9\n40,110,1,9\n", 2, 4),
        ("age,bp,label\n30,100,0\n40,110,1,9\n50,120,0\n", 3, 4),
        ("\n\nage,bp,label\n\n30,100,0,\n40,110,1\n", 5, 4),
        ("age,bp,label\n30,100,0\n\n40,110,1,2,3\n", 4, 5),
        ('age,bp,label\n"30","100",0,"9"\n', 2, 4),
        ("age,bp,label\n,,,\n30,100,0,9\n", 2, 4),
        ('" "\n1,0\n2,1\n', 2, 2),
    ],
)
def test_row_longer_than_the_header_is_named(
    tmp_path: Path, text: str, line: int, fields: int
) -> None:
    """Pandas takes the first column for an index, and every value moves one column to the left."""
    message = refused("csv", write(tmp_path / "t.csv", text).parent, "t.csv")
    assert f"line {line}" in message
    assert str(fields) in message


@FUZZ
@given(st.lists(st.lists(st.sampled_from(["", " ", "1", '"2"', '"a,b"']), max_size=4), max_size=5))
def test_no_row_longer_than_the_header_is_read(tmp_path: Path, rows: list[list[str]]) -> None:
    (tmp_path / "t.csv").write_text(
        "\n".join(map(",".join, [["a", "label"], *rows, ["1", "1"], ["2", "2"]]))
    )
    if read_or_refused("csv", tmp_path / "t.csv", "t.csv"):
        assert max(map(len, rows), default=0) <= 2


def test_quoted_separators_and_shorter_rows_are_no_longer_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", '\ufeffage,"b,p",label\n"30","1e2","a,b\nc"\n40\n50,,x\n')
    with pytest.raises(SourceError, match=r"1 rows of .* have none"):
        read("csv", path)
    path.write_text('\ufeffage,"b,p",label\n"30","1e2","a,b"\n50,,x\n', encoding="utf-8")
    examples = read("csv", path)
    assert (examples.columns, examples.classes) == (("age", "b,p"), ("a,b", "x"))
    assert examples.x.nan_to_num(-1).tolist() == [[30, 100], [50, -1]]


@pytest.mark.parametrize("value", ["inf", "-inf", "1e300", "1e39", "1e20", "-1e19"])
def test_values_that_a_float32_cannot_square_are_named(tmp_path: Path, value: str) -> None:
    write(tmp_path / "a.csv", "age,bp,label\n30,1,0\n40,2,1\n")
    write(tmp_path / "b.csv", f"age,bp,label\n30,1,0\n40,{value},1\n50,3,1\n")
    assert "column 'bp'" in refused("csv", tmp_path, "b.csv")


def test_largest_values_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", f"age,label\n{2**63 - 1},0\n{-(2**63)},1\n")
    assert read("csv", path).x.tolist() == [[2.0**63], [-(2.0**63)]]


def test_column_of_the_name_that_files_had_does_not_vanish(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "__file__,label\n1,0\n2,1\n")
    examples = read("csv", path)
    assert (examples.columns, examples.x.tolist()) == (("__file__",), [[1.0], [2.0]])


def test_tables_with_no_row_or_one_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "a,label\n1,0\n")
    assert "1 row is too few: at least 2" in refused("csv", path, "t.csv")
    path.write_text("a,label\n")
    assert "has no rows" in refused("csv", path, "t.csv")
    write(tmp_path / "u.csv", "a,label\n1,0\n2,0\n")
    assert "has no rows" in refused("csv", tmp_path, "t.csv")


@pytest.mark.parametrize("source", ["csv", "text-csv"])
def test_pipes_and_devices_are_refused(tmp_path: Path, source: str) -> None:
    os.mkfifo(tmp_path / "t.csv")
    assert "no regular file" in refused(source, tmp_path / "t.csv", "t.csv")
    assert "no regular file" in refused(source, tmp_path, "t.csv")
    assert "no regular file" in refused(source, Path("/dev/zero"), "/dev/zero")


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfea\x00,\x00", b"a,label\n\xe9,1\n", b"\x00" * 50, b'a,label\n"1,2\n', b"\x89PNG"],
)
def test_what_is_no_table_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    refused("csv", tmp_path / "t.csv", "t.csv")


@FUZZ
@given(**HARM)
def test_damaged_table_is_read_or_named(tmp_path: Path, cut: int, flips: dict[int, int]) -> None:
    text = b"age,bp,label\n" + b"".join(b"%d,%d,%d\n" % (n, 3 * n, n % 3) for n in range(20))
    (tmp_path / "t.csv").write_bytes(damaged(text, cut or len(text), flips))
    if found := read_or_refused("csv", tmp_path / "t.csv", "t.csv"):
        assert not found.x.isinf().any()


@pytest.mark.parametrize(
    "data", [b"", b"garbage", bytes(100), struct.pack(">IIII", 0x803, 9, 28, 28) + bytes(5)]
)
@pytest.mark.parametrize("kind", ["MNIST", "FashionMNIST"])
def test_garbage_in_the_place_of_mnist_is_named(tmp_path: Path, kind: str, data: bytes) -> None:
    raw = tmp_path / kind / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", 3), ("t10k", 2)):
        pictures = struct.pack(">IIII", 0x803, size, 28, 28) + bytes(size * 28 * 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pictures)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, size) + bytes(range(size))
        )
    source = "mnist" if kind == "MNIST" else "fashion-mnist"
    assert read(source, tmp_path).y.tolist() == [0, 1, 2, 0, 1]
    (raw / "t10k-images-idx3-ubyte").write_bytes(data)
    refused(source, tmp_path, "t10k-images-idx3-ubyte")
    (raw / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 2, 8, 8) + bytes(128))
    refused(source, tmp_path, str(tmp_path))


def test_group_that_takes_for_ever_is_ended(tmp_path: Path) -> None:
    (tmp_path / ("a" * 40)).mkdir()
    wavfile.write(tmp_path / ("a" * 40) / "a.wav", 8000, np.zeros(9, dtype=np.int16))
    with pytest.raises(SourceError, match=r"data\.group = .* takes too long"):
        read("audio-folder", tmp_path, group="(?:a+)+$(x)")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("(x", "a regular expression with one bracket is expected"),
        ("low", "a regular expression with one bracket is expected: no such group"),
        ("low(x)?", "finds nothing in 'low/a.wav'"),
        ("(" * 5000, "data.group = "),
        ("(low" + "x" * 100_000, "100004 characters"),
        ("(.*)", "allowed: 1 to 64"),
        ("(.)$^", "finds nothing"),
    ],
)
def test_group_that_names_no_site_is_refused(sounds: Path, group: str, message: str) -> None:
    if group == "(.*)":
        (sounds / "low" / "a.wav").rename(sounds / "low" / f"{'a' * 100}.wav")
    with pytest.raises(SourceError) as error:
        read("audio-folder", sounds, group=group)
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def test_every_ending_that_is_listed_has_a_format() -> None:
    assert set(folders.PICTURES.values()) <= set(Image.registered_extensions().values())
