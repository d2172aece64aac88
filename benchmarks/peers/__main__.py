"""``python benchmarks/peers``: ours beside TRL."""

import sys

from compared import main

if __name__ == "__main__":
    main(sys.argv[1:])
