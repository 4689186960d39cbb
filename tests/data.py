"""Small files of data that tests write."""

import struct
import wave
from pathlib import Path

import numpy as np


def write_audio(folder: Path) -> None:
    """Two tones, by six speakers, four takes each."""
    generator = np.random.default_rng(1)
    for digit in range(2):
        (folder / str(digit)).mkdir(parents=True)
        for speaker in "abcdef":
            for take in range(4):
                with wave.open(str(folder / str(digit) / f"{digit}_{speaker}_{take}.wav"), "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    tone = np.sin(np.arange(4000) * (0.1 + 0.3 * digit)) * 20000 + generator.normal(size=4000) * 500
                    file.writeframes(struct.pack("<4000h", *tone.astype(int)))


def write_texts(file: Path) -> None:
    """80 texts of two topics."""
    generator = np.random.default_rng(1)
    words = ["ball", "goal", "match"], ["bank", "market", "money"]
    texts = [f'{kind},"{" ".join(generator.choice(words[kind], 5))}"' for kind in (0, 1) * 40]
    file.write_text("label,text\n" + "\n".join(texts))
