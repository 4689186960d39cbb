"""Flower's SuperNode, whose process ends when it does.

    python -P deploy/supernode.py ...       the arguments of flower-supernode

A SuperNode gives up where TLS fails, such as behind a load balancer that takes connections while
the SuperLink restarts; but the process stays, since a thread of its own goes on, and whoever
supervises it sees nothing wrong (seen with Flower 1.42).
"""

import os
import sys
import traceback
from importlib.metadata import entry_points


def main() -> None:
    """Run the SuperNode."""
    [command] = entry_points(group="console_scripts", name="flower-supernode")
    code = 1
    try:
        command.load()()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
