"""``python -m qdq`` is ``qdq``."""

import sys

from qdq.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
