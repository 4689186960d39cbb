"""Decoded data sets on disk: one process decodes, every later one maps the file into its memory.

Entries lie in ``$XDG_CACHE_HOME/archipelago/decoded`` (by default ``~/.cache/...``) and are as
secret as the data. safetensors maps a file privately: its pages are read when they are touched, all
processes share them, and what a process writes into a tensor it alone sees. An entry is not read
whole to be checked: bytes that a disk alters go unseen.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from datasets.examples import Examples
from datasets.lazy import Lazy
from datasets.names import shown

TENSORS, NAMES = ("x", "y", "group", "test"), ("classes", "groups", "columns")
# The libraries that decode.
LIBRARIES = ("numpy", "pandas", "pillow", "scikit-learn", "scipy", "torch", "torchvision")


def digest(value: object) -> str:
    """A digest of a value that JSON can hold."""
    return sha256(json.dumps(value).encode()).hexdigest()[:32]


def _code() -> str:
    """A digest of the decoders and their libraries: others may return other examples."""
    return digest(
        [
            *map(version, LIBRARIES),
            *(file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))),
        ]
    )


CODE = _code()  # now: later the files may be others than those that this process runs


def cache_folder(name: str) -> Path:
    """The folder of one kind of entry in this user's cache; its ``~`` is not yet expanded.

    Expanding it may fail.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "archipelago", name)


def fingerprint(files: Path | None) -> str:
    """The fingerprint of a file, or of every file below a folder.

    It is made of relative names, sizes and times of change. None: of nothing, a package has the
    data.

    It would miss a change that leaves all three alone: in a tick of the file system's clock, or
    with the time set back after it.
    """
    if files is None:
        return ""
    names = (
        [str(files)]
        if files.is_file()
        else [os.path.join(at, name) for at, _, names in os.walk(files) for name in names]
    )
    found = []
    for name in names:
        with suppress(OSError):  # a link to nothing, or gone meanwhile
            about = os.stat(name)
            found.append((name[len(str(files)) :], about.st_size, about.st_mtime_ns))
    return digest(sorted(found))


def cached(
    source: str, files: Path | None, options: Mapping[str, object], decode: Callable[[], Examples]
) -> Examples:
    """The examples that ``decode`` returns; from disk if it was called before.

    That is before for the same contents, options and code. Lazy examples are returned as they are.

    Of several processes one decodes and the others wait. Entries of the same ``files`` and options,
    but of other contents or code, are deleted. Without a folder that can be written to, a warning
    names it and everybody decodes.

    Args:
        source: a name.
        files: the file or folder that is read (:func:`fingerprint`).
        options: all else that ``decode`` depends on.
        decode: whatever it raises is raised, and nothing is kept.
    """
    place = f"{source}-{digest([str(files and files.resolve()), options])}"
    content = fingerprint(files)
    folder = cache_folder("decoded")
    with ExitStack() as stack:
        try:
            folder = folder.expanduser()
            entry = folder / f"{place}-{digest([content, CODE])}.safetensors"
            if found := _read(entry):
                return found
            folder.mkdir(0o700, parents=True, exist_ok=True)
            folder.chmod(folder.stat().st_mode & 0o700)  # a read-only one stays so
            stack.enter_context(FileLock(folder / f"{place}.lock", mode=0o600))
        except TimeoutError:  # the caller's, whose time is up
            raise
        except (OSError, RuntimeError) as error:  # RuntimeError: no home, no locks
            _warn(folder, error)
            return _contiguous(decode())
        if found := _read(entry):
            return found
        examples = _contiguous(decode())
        if isinstance(examples.x, Lazy):
            return examples
        if fingerprint(files) == content:  # else they were changed, or downloaded, meanwhile
            try:
                _write(entry, place, examples)
            except (OSError, SafetensorError) as error:
                _warn(folder, error)
        return _read(entry) or examples


def _contiguous(examples: Examples) -> Examples:
    if isinstance(examples.x, Lazy):
        return examples
    return examples._replace(
        **{
            name: value.contiguous()
            for name in TENSORS
            if (value := getattr(examples, name)) is not None
        }
    )


def _read(entry: Path) -> Examples | None:
    """The examples of an entry, mapped; None where there is none or it is damaged."""
    try:
        with safe_open(entry, "pt") as file:
            found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = json.loads(file.metadata()["names"])
        return Examples(**found | {name: tuple(names[name]) for name in NAMES})
    except (OSError, SafetensorError, RuntimeError, TypeError, KeyError, ValueError):
        return None


def _write(entry: Path, place: str, examples: Examples) -> None:
    # Of other contents, damaged, or of a process that was killed.
    for old in entry.parent.glob(f"{place}-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    # In a folder: safetensors leaves files under more than one name.
    with TemporaryDirectory(prefix=f"{place}-", dir=entry.parent) as partial:
        file = Path(partial, entry.name)
        tensors = {
            name: value for name in TENSORS if (value := getattr(examples, name)) is not None
        }
        save_file(
            tensors, file, {"names": json.dumps({name: getattr(examples, name) for name in NAMES})}
        )
        file.chmod(0o600)
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.rename(entry)


def _warn(folder: Path, error: Exception) -> None:
    text = (
        f"decoded data are not kept in {shown(str(folder))}, "
        f"every process decodes them again: {error}"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=4)
