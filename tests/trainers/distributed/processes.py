"""Run by torchrun: phases one after the other in the same processes, because starting them costs more than the phases.

Takes phase files as ``TYPE=PATH``; writes each one's exit code beside it, and ends at the first that fails.
"""

import os
import sys
from pathlib import Path

import torch

from trainers import launch


def main() -> int:
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        kind, path = argument.split("=", 1)
        code = launch.run_phase(kind, Path(path), [])
        if os.environ["RANK"] == "0":
            Path(path).with_suffix(".code").write_text(str(code))
        if code:
            return code  # the others wait for this one: nothing that follows can run
    return 0


if __name__ == "__main__":
    sys.exit(main())
