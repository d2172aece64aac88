"""Training that is cut off goes on: alike with the same bits, another way with the same data in the same order.

And what another way leaves of the same state of training are the same files.
"""

import os
import shutil
import signal
import time

import pytest
from distributed.agreement import agree
from distributed.cells import TRAINED, WAYS
from distributed.compare import exported, final_metrics, lines_of, losses
from distributed.conftest import output_of
from distributed.ending import Ending, run_until
from distributed.processes import finish, run_phases, start, succeed
from distributed.test_trajectory import REDUCED

from trainers.contract import FailureClass, exit_status
from trainers.core.checkpoint import steps_in

SEED = os.environ.get("SEED", "0")
ENDINGS = ("SIGKILL of one", "SIGTERM of all", "SIGKILL of all", "SIGTERM of one")
SECONDS = 60
"""From a process's death to its peers' end: about one on an idle machine, 30 are promised."""

OTHER = {
    "ddp": "zero 1",
    "zero 1": "fsdp",
    "fsdp": "zero 3",
    "zero 3": "fsdp on four",
    "fsdp on four": "fsdp",
    "fsdp, hybrid": "ddp",
    "zero 2": "fsdp alone",
    "fsdp, offloaded": "zero 3, offloaded",
    "zero 3, offloaded": "zero 2",
    "fsdp, adapters": "zero 3, adapters",
    "zero 3, adapters": "ddp, adapters",
    "zero 2, weights in bf16": "zero 3, weights in bf16",
    "zero 3, weights in bf16": "fsdp, weights in bf16",
}
"""Ways that are cut off, and those that go on instead."""

EXPORTED = ["ddp", "fsdp", "fsdp, hybrid", "zero 1", "zero 2", "zero 3", "fsdp, adapters", "zero 3, adapters"]
EXPORTED += ["zero 2, adapters", "fsdp in bf16", "zero 3 in bf16", "zero 1, weights in bf16", "zero 3, weights in bf16"]


def test_some_training_that_is_cut_off_goes_on(phase_files, run_way, tmp_path):
    kinds = REDUCED["fsdp"][:1]
    check_resumed("fsdp", "zero 3", run_way(WAYS["fsdp"], REDUCED["fsdp"]), kinds, phase_files, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("name", OTHER)
def test_training_that_is_cut_off_goes_on(name, phase_files, run_way, tmp_path):
    check_resumed(name, OTHER[name], run_way(WAYS[name]), TRAINED, phase_files, tmp_path)


def check_resumed(name, instead, whole, kinds, phase_files, tmp_path):
    way, other = WAYS[name], WAYS[instead]
    same, another = (tmp_path / part for part in ("same", "another"))
    files, elsewhere = phase_files(way, same, kinds), phase_files(other, another, kinds)
    cut_off(name, files, tmp_path / "ending.log")
    before = {kind: kept_lines(output_of(same, kind)) for kind in kinds}
    assert any(before.values()), "some of it was saved"
    for kind in kinds:
        shutil.copytree(output_of(same, kind), output_of(another, kind))
    succeed(way, run_phases, files, log=tmp_path / "log")
    succeed(other, run_phases, elsewhere, log=tmp_path / "log")
    for kind in kinds:
        ours, theirs, expected = output_of(same, kind), output_of(another, kind), whole[kind]
        for found in (ours, theirs):
            assert lines_of(found)[: len(before[kind])] == before[kind], f"{kind}: begun anew"
        assert losses(ours) == losses(expected), kind
        assert final_metrics(ours) == final_metrics(expected), kind
        assert exported(ours / "model") == exported(expected / "model"), kind
        agree(way, kind, theirs, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("name", EXPORTED)
def test_exports_of_the_same_state_are_the_same_files(name, phase_files, run_way, tmp_path):
    """The last checkpoint of one process is taken on, and there is nothing left to do but to leave the model."""
    way = WAYS[name]
    whole, files = run_way(way.alone), phase_files(way, tmp_path, TRAINED)
    for kind in TRAINED:
        shutil.copytree(whole[kind] / "checkpoints", output_of(tmp_path, kind) / "checkpoints")
        shutil.copy(whole[kind] / "identity.json", output_of(tmp_path, kind))
    succeed(way, run_phases, files, log=tmp_path / "log")
    for kind in TRAINED:
        ours, theirs = (exported(phase / "model") for phase in (output_of(tmp_path, kind), whole[kind]))
        assert {file for file in ours.keys() | theirs.keys() if ours.get(file) != theirs.get(file)} == set(), kind


def cut_off(name, files, log):
    """Each phase in its own way. Those that are asked to stop can be so in the same processes."""
    way, turn = WAYS[name], list(OTHER).index(name)
    endings = [
        Ending.chosen(ENDINGS[(turn + i) % 4], way.processes, f"{SEED} {name} {kind}")
        for i, (kind, _) in enumerate(files)
    ]
    stopped = [i for i, ending in enumerate(endings) if ending.what == signal.SIGTERM]
    killed = [[i] for i in range(len(files)) if i not in stopped]
    for chosen in filter(None, [stopped, *killed]):
        ends(way, [files[i] for i in chosen], [endings[i] for i in chosen], log)


def ends(way, files, endings, log):
    ranks = start(way, run_until, files, endings, log=log)
    if endings[0].what == signal.SIGTERM:
        codes = finish(ranks)
        assert codes == [exit_status(FailureClass.INTERRUPTED)] * way.processes, f"{codes} {endings}\n{log.read_text()}"
        return
    finish([ranks[rank] for rank in endings[0].ranks])
    died = time.monotonic()
    codes = finish(ranks, SECONDS)
    took = f"{codes} {endings} {time.monotonic() - died:.0f} s"
    killed = [code for code in codes if code == -signal.SIGKILL]
    assert 1 <= len(killed) <= len(endings[0].ranks), f"{took}\n{log.read_text()[-6000:]}"
    others = {code for code in codes if code != -signal.SIGKILL}
    assert others <= {exit_status(FailureClass.INFRASTRUCTURE)}, f"{took}\n{log.read_text()[-6000:]}"


def kept_lines(phase):
    """What stands in metrics.jsonl of the steps that are saved: those are not done again."""
    saved = max((step for step, _ in steps_in(phase / "checkpoints")), default=0)
    return [line for line in (lines_of(phase) if saved else []) if line["step"] <= saved]
