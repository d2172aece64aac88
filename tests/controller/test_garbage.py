"""How often the operator's memory is looked through as a whole, in a process of its own."""

import subprocess
import sys

PROGRAM = """
import gc, json
from controller.operator.garbage import collect_seldom
if {seldom}:
    collect_seldom()
whole = []
gc.callbacks.append(lambda phase, info: whole.append(1) if phase == "start" and info["generation"] == 2 else None)
document = json.dumps({{"status": {{"phases": [{{"attempts": [{{"number": n}}]}} for n in range(1_000)]}}}})
remembered = {{}}
for number in range(1_000):
    remembered[number % 100] = json.loads(document)
print(len(whole))
"""


def collections(seldom: bool) -> int:
    """Of everything, while a hundred large statuses are told of ten times each."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(seldom=seldom)], capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


def test_what_is_remembered_is_looked_through_seldom_though_not_never():
    usual, seldom = collections(seldom=False), collections(seldom=True)
    assert usual >= 5
    assert 1 <= seldom <= usual // 5
