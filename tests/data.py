"""Small files of data that tests write."""

import struct
import wave
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from datasets.examples import Examples
from datasets.lazy import IGNORED
from datasets.sources import digits


def write_audio(folder: Path) -> None:
    """Two tones, by six speakers, four takes each."""
    generator = np.random.default_rng(1)
    for digit in range(2):
        (folder / str(digit)).mkdir(parents=True)
        for speaker in "abcdef":
            for take in range(4):
                with wave.open(
                    str(folder / str(digit) / f"{digit}_{speaker}_{take}.wav"), "wb"
                ) as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    tone = (
                        np.sin(np.arange(4000) * (0.1 + 0.3 * digit)) * 20000
                        + generator.normal(size=4000) * 500
                    )
                    file.writeframes(struct.pack("<4000h", *tone.astype(int)))


def write_texts(file: Path) -> None:
    """80 texts of two topics."""
    generator = np.random.default_rng(1)
    words = ["ball", "goal", "match"], ["bank", "market", "money"]
    texts = [f'{kind},"{" ".join(generator.choice(words[kind], 5))}"' for kind in (0, 1) * 40]
    file.write_text("label,text\n" + "\n".join(texts))


def write_keys(folder: Path, sites: int = 4) -> list[dict[str, Any]]:
    """Files of keys for so many deployed sites; the ``--node-config`` of each."""
    folder.mkdir()
    private = [X25519PrivateKey.generate() for _ in range(sites)]
    public = [b64encode(key.public_key().public_bytes_raw()).decode() for key in private]
    (folder / "peers.toml").write_text(
        "\n".join(f'{site} = "{key}"' for site, key in enumerate(public))
    )
    nodes = []
    for site, key in enumerate(private):
        (folder / f"{site}.key").write_bytes(b64encode(key.private_bytes_raw()))
        (folder / f"{site}.key").chmod(0o600)
        files = {
            "private-key": str(folder / f"{site}.key"),
            "peer-keys": str(folder / "peers.toml"),
        }
        nodes.append({"site": site, "data": "", **files})
    return nodes


def write_numbers(file: Path, rows: int = 240) -> pd.DataFrame:
    """A table of two features, two numbers that follow from them, two labels that may both hold."""
    generator = np.random.default_rng(1)
    frame = pd.DataFrame(
        {"age": generator.uniform(20, 90, rows), "height": generator.normal(170, 9, rows)}
    )
    frame["pressure"] = 80 + 0.6 * frame["age"] + generator.normal(0, 2, rows)
    frame["pulse"] = 60 + 0.2 * (frame["height"] - 170)
    frame["old"] = (frame["age"] > 60).astype(int)
    frame["tall"] = (frame["height"] > 172).astype(int)
    frame.to_csv(file, index=False)
    return frame


def squares(path: str) -> Examples:
    """Pictures of a light square on dark noise, and for each pixel whether it is of the square.

    The pixels of the top border do not count.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 90, (60, 1, 16, 16), generator=generator, dtype=torch.uint8)
    y = torch.zeros(60, 16, 16, dtype=torch.int64)
    for picture, (row, column) in enumerate(
        torch.randint(1, 8, (60, 2), generator=generator).tolist()
    ):
        x[picture, 0, row : row + 7, column : column + 7] += 150
        y[picture, row : row + 7, column : column + 7] = 1
    y[:, 0] = IGNORED
    return Examples(x, y, ("ground", "square"))


def few(path: str) -> Examples:
    """A tenth of the digits."""
    examples = digits()
    return examples._replace(x=examples.x[:180], y=examples.y[:180])


def large(path: str) -> Examples:
    """A few digits of 24 x 24 pixels."""
    examples = few(path)
    x = examples.x[:60].repeat_interleave(3, -1).repeat_interleave(3, -2)
    return examples._replace(x=x, y=examples.y[:60])
