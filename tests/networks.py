"""Small networks that several tests train."""

from torch import nn

from models.networks import build


def language(context: int = 16, **changes: int) -> nn.Module:
    """A small GPT of 31 tokens."""
    return build(
        "gpt",
        (context,),
        31,
        1,
        output=(context, 31),
        tokens=True,
        **{"layers": 3, "width": 24, "heads": 2} | changes,
    )
