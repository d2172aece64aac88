"""``python benchmarks/peers``: ours beside TRL."""

import sys

from compared import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("stopped; RESUME=1 takes the rows that are there")
