"""What sealing costs: 100 MB for two neighbours, and opening it.

python -m benchmarks.sealing
"""

import os
import statistics
import time

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client_app.sealing import Header, Keyring


def main() -> None:
    """Print both."""
    private = [X25519PrivateKey.generate() for _ in range(3)]
    public = {number: key.public_key().public_bytes_raw() for number, key in enumerate(private)}
    nonces = {number: os.urandom(16) for number in public}
    rings = [Keyring(number, key, public, nonces) for number, key in enumerate(private)]
    data, header = os.urandom(100_000_000), Header(1, 0, 1, "model")
    rings[0].seal(data, [1, 2], header)
    seal, opened = [], []
    for _ in range(5):
        start = time.perf_counter()
        sealed, keys, _ = rings[0].seal(data, [1, 2], header)
        middle = time.perf_counter()
        assert rings[2].open(sealed, keys[2], header) == data
        seal.append(middle - start)
        opened.append(time.perf_counter() - middle)
    sealed_ms, opened_ms = (1000 * statistics.median(found) for found in (seal, opened))
    print(
        f"100 MB: sealed for two neighbours in {sealed_ms:.0f} ms, "
        f"opened by one in {opened_ms:.0f} ms"
    )


if __name__ == "__main__":
    main()
