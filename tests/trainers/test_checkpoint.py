"""Checkpoints that were damaged afterwards: found out before anything of them is used."""

import errno
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saving_context import saving_context

from trainers.contract import Diverged, Infrastructure
from trainers.core.checkpoint import Checkpoints
from trainers.core.flops import ModelFlops
from trainers.core.saving.schedule import Clock, shared_interval
from trainers.core.saving.storage import ShardReader
from trainers.core.tensors import DamagedError, content_sum, read_tensors, write_tensors
from trainers.core.trainee import Trainee
from trainers.spec import Checkpoint, Optim


class OneProcess:
    """What a run of one process needs of Workers."""

    device = torch.device("cpu")
    world, rank, is_main = 1, 0, True
    zero = None
    accelerator = SimpleNamespace(prepare_model=lambda module: module)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Everything about other processes gives back what it is given."""
        return lambda value=None, *_: value


@pytest.fixture
def ctx(tmp_path):
    return saving_context(OneProcess(), tmp_path)


def checkpoints(ctx, width: int = 6, keep_last: int = 9, **optim) -> Checkpoints:
    torch.manual_seed(0)
    models = {name: torch.nn.Linear(4, width) for name in ("policy", "critic")}
    trainees = {name: trainee(ctx, model, Optim(lr=1e-2, **optim)) for name, model in models.items()}
    return Checkpoints(ctx, Checkpoint(keep_last=keep_last), trainees)


def trainee(ctx, model: torch.nn.Module, optim: Optim) -> Trainee:
    return Trainee(ctx.workers, model, optim, 10, ModelFlops(0, 0, 1.0, 0))


def train(saved: Checkpoints, first: int, last: int) -> None:
    for step in range(first, last):
        for trainee in saved.trainees.values():
            (trainee.module(torch.full((2, 4), step + 1.0)) - 3).square().mean().backward()
            trainee.update(step)
        saved.save(step + 1)
    saved.wait()


def snapshot(saved: Checkpoints) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor.clone()
        for name, trainee in saved.trainees.items()
        for key, tensor in trainee.engine.saved()
    }


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def middle_of(path: Path, content: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: -len(content) - 4] + content + whole[-4:])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(min(tensors))
    write_tensors(path, tensors)


def of_another_step(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-1") / path.name, path)


def with_a_digit_changed(path: Path) -> None:
    content = path.read_text()
    digit = next(i for i, c in enumerate(content) if c.isdigit())
    path.write_text(f"{content[:digit]}{(int(content[digit]) + 1) % 10}{content[digit + 1 :]}")


FILE_DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "a block of zeros": lambda path: middle_of(path, bytes(16)),
    "a flipped bit": lambda path: middle_of(path, bytes([path.read_bytes()[-5] ^ 1])),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without a tensor": without_a_tensor,
    "of another step": of_another_step,
}
JSON_DAMAGES = {
    "missing": lambda path: path.unlink(),
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a list": lambda path: path.write_text("[1]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a digit changed": with_a_digit_changed,
    "of another step": of_another_step,
}
DAMAGES = [
    pytest.param("shard-00000.safetensors", damage, id=f"shard: {kind}") for kind, damage in FILE_DAMAGES.items()
] + [
    pytest.param(file, damage, id=f"{file}: {kind}")
    for file in ("state.json", "index.json")
    for kind, damage in JSON_DAMAGES.items()
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_of_a_damaged_checkpoint_nothing_is_loaded(ctx, capsys, file, damage):
    made = checkpoints(ctx)
    train(made, 0, 1)
    first = snapshot(made)
    train(made, 1, 2)
    damage(ctx.dir.checkpoints / "step-2" / file)
    again = checkpoints(ctx)
    assert again.restore() == 1
    assert same(snapshot(again), first)
    said = capsys.readouterr().err
    assert "step-2 cannot be used (" in said and "trying an older one" in said
    shutil.rmtree(ctx.dir.checkpoints / "step-1")
    fresh = checkpoints(ctx)
    untouched = snapshot(checkpoints(ctx))
    assert fresh.restore() == 0
    assert same(snapshot(fresh), untouched)


@pytest.mark.parametrize("changes", [{}, {"state_dtype": "bf16"}])
def test_going_on_is_exact(ctx, changes):
    made = checkpoints(ctx, **changes)
    train(made, 0, 3)
    again = checkpoints(ctx, **changes)
    assert again.restore() == 3
    assert same(snapshot(again), snapshot(made))
    train(made, 3, 5)
    train(again, 3, 5)
    assert same(snapshot(again), snapshot(made))


def test_a_checkpoint_of_a_wider_model_is_not_used(ctx, capsys):
    train(checkpoints(ctx, width=5), 0, 1)
    assert checkpoints(ctx).restore() == 0
    assert "bias has shape [5], the model's has [6]" in capsys.readouterr().err


def test_a_file_in_a_checkpoints_place_is_passed_over(ctx):
    made = checkpoints(ctx)
    train(made, 0, 1)
    (ctx.dir.checkpoints / "step-7").write_text("no folder")
    assert checkpoints(ctx).restore() == 1
    train(made, 1, 2)  # which also clears away old checkpoints


def test_a_disk_that_fails_while_a_checkpoint_is_read_says_so(ctx, monkeypatch):
    """torch wraps it in what is no Exception, which would end the phase without a word."""
    train(checkpoints(ctx), 0, 1)

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ShardReader, "_read", fails)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints(ctx).restore()


def test_without_its_best_weights_a_checkpoint_is_of_no_use(ctx, capsys):
    made = checkpoints(ctx)
    train(made, 0, 1)
    made.keep_best("policy", 0.5, higher_is_better=False)
    train(made, 1, 2)
    best = ctx.dir.checkpoints / "best-1" / "shard-00000.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    with pytest.raises(Infrastructure, match=r"best weights .* cannot be read"):
        made.load_best("policy")
    assert checkpoints(ctx).restore() == 1, "which knew of no best yet"
    assert "shard-00000.safetensors" in capsys.readouterr().err


def test_the_best_weights_come_back(ctx):
    made = checkpoints(ctx)
    for step, score in enumerate((0.7, 0.4, 0.6)):
        train(made, step, step + 1)
        made.keep_best("policy", score, higher_is_better=False)
        if score == 0.4:
            best = weights(made)
    made.load_best("policy")
    assert same(weights(made), best)


def weights(saved: Checkpoints) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in saved.trainees["policy"].engine.saved(moments=False)}


def test_each_checkpoint_keeps_the_best_weights_that_it_needs(ctx):
    made = checkpoints(ctx, keep_last=2)
    for step, score in enumerate((0.9, 0.8, 0.85, 0.85, 0.7)):
        made.keep_best("policy", score, higher_is_better=False)
        train(made, step, step + 1)
    assert {path.name for path in ctx.dir.checkpoints.iterdir()} == {"step-4", "step-5", "best-2", "best-3"}
    shutil.rmtree(ctx.dir.checkpoints / "step-5")
    again = checkpoints(ctx)
    assert again.restore() == 4 and again.state == {"best": 0.8, "bestNumber": 2}
    again.load_best("policy")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_the_best(ctx, value):
    with pytest.raises(Diverged, match="held-out score"):
        checkpoints(ctx).keep_best("policy", value, higher_is_better=False)


def test_tensors_come_back_in_every_type(tmp_path):
    tensors = {
        str(t.dtype): t for t in (torch.arange(7).to(d) for d in (*FLOATS, torch.int64, torch.uint8, torch.bool))
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "turned": torch.arange(6.0).view(2, 3).T}
    write_tensors(tmp_path / "file", tensors)
    found = read_tensors(tmp_path / "file")
    assert same(found, tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_the_sum_sees_a_change_of_any_one_bit():
    tensor = torch.randn(5)
    for bit in range(32):
        changed = tensor.clone()
        changed.view(torch.int32)[3] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        assert content_sum(changed) != content_sum(tensor)


def test_sums_that_are_no_sums_are_damage(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "file", {"sums": json.dumps(None)})
    with pytest.raises(DamagedError):
        read_tensors(tmp_path / "file")


@pytest.mark.parametrize("best", [False, True])
def test_what_a_full_disk_cut_off_does_not_stay_on_it(ctx, monkeypatch, best: bool):
    saved = checkpoints(ctx)

    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("trainers.core.saving.storage.write_tensors", full)
    saved.keep_best("policy", 1.0, higher_is_better=True) if best else saved.save(1)
    with pytest.raises(OSError, match="No space left"):
        saved.wait()
    with pytest.raises(OSError, match="No space left"):
        saved.after_step(2, 9)
    assert list(ctx.dir.checkpoints.rglob("*")) == []


def test_what_training_changes_after_a_save_is_not_in_it(ctx, monkeypatch):
    """Files are written only when everything was updated again."""
    made, go = checkpoints(ctx), threading.Event()

    def late(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        assert go.wait(10)
        return write_tensors(path, tensors)

    monkeypatch.setattr("trainers.core.saving.storage.write_tensors", late)
    made.save(1)
    first = snapshot(made)
    for trainee in made.trainees.values():
        (trainee.module(torch.ones(2, 4)) - 3).square().mean().backward()
        trainee.update(0)
    assert not (ctx.dir.checkpoints / "step-1").exists()
    go.set()
    made.wait()
    again = checkpoints(ctx)
    assert again.restore() == 1 and same(snapshot(again), first)


# ---------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("waited", "written", "seconds"),
    [
        pytest.param(0.001, 0.05, 60, id="4 MB"),
        pytest.param(2, 20, 100, id="18 GB"),
        pytest.param(4, 20, 200, id="18 GB, staged slowly"),
        pytest.param(2, 180, 900, id="18 GB to a store"),
    ],
)
def test_the_time_between_saves_grows_with_what_they_cost(waited: float, written: float, seconds: float):
    interval = shared_interval(Checkpoint().time_share, waited, written)
    assert interval == pytest.approx(seconds)
    assert waited / interval <= 0.02 and written / interval <= 0.2


@pytest.mark.parametrize(
    ("spec", "written", "due"),
    [
        ({}, 1.0, 61),
        ({}, 20.0, 101),
        ({}, None, None),
        ({"time_share": 0.2}, 100.0, 101),
        ({"time_share": None}, 1.0, None),
        ({"every_seconds": 30}, None, 31),
    ],
)
def test_the_first_second_at_which_the_clock_asks_for_a_save(
    monkeypatch, spec: dict, written: float | None, due: int | None
):
    """``written``: None while the last save is still being written."""
    monkeypatch.setattr("trainers.core.saving.schedule.time", SimpleNamespace(monotonic=lambda: now))
    now = 0
    clock = Clock(Checkpoint(**spec))
    clock.saved(0.01)
    found = []
    for now in range(200):
        found += [now] if clock.is_due(written) else []
    assert (found[0] if found else None) == due
