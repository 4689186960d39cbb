"""One seed for a run; every draw has a generator of its own."""

import hashlib


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A seed for one purpose, such as ``derive(1, "order", site, round)``.

    It is the same on every machine. Draws for different purposes, sites or rounds share nothing, so
    what one site does never changes what another one draws.
    """
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
