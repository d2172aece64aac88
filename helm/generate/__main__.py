"""Write what is out of date, or with ``--check`` only say so, with status 1."""

import sys

from generate import COMMAND
from generate.files import ROOT, drift, generated


def main(check: bool) -> int:
    stale = drift(ROOT)
    if check:
        for path in stale:
            print(f"{path} is out of date: run `{COMMAND}`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(generated()[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
