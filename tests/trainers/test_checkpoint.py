"""Checkpoints that were damaged afterwards: found out before anything of them is used."""

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.contract import Diverged, Infrastructure
from trainers.core.checkpoint import Checkpoints
from trainers.core.flops import ModelFlops
from trainers.core.tensors import DamagedError, content_sum, read_tensors, write_tensors
from trainers.core.trainee import Trainee
from trainers.spec import Checkpoint, Optim


class OneProcess:
    """What a run of one process needs of Workers."""

    device = torch.device("cpu")
    world, is_main = 1, True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Everything about other processes gives back what it is given."""
        return lambda value=None, *_: value


@pytest.fixture
def ctx(tmp_path):
    meter = SimpleNamespace(
        part=lambda name: nullcontext(),
        seconds=lambda: 1.0,
        seconds_before=0.0,
        checkpointed=lambda step: None,
        will_checkpoint=lambda step: None,
    )
    return SimpleNamespace(
        workers=OneProcess(),
        meter=meter,
        dir=SimpleNamespace(checkpoints=tmp_path / "checkpoints"),
        keep=lambda *args, **kwargs: None,
        before_replacing=lambda: None,
        writes_for_others=True,
        stop_asked=False,
    )


def checkpoints(ctx, width: int = 6, **optim) -> Checkpoints:
    torch.manual_seed(0)
    models = {name: torch.nn.Linear(4, width) for name in ("policy", "critic")}
    trainees = {name: trainee(ctx, model, Optim(lr=1e-2, **optim)) for name, model in models.items()}
    return Checkpoints(ctx, Checkpoint(keep_last=9), trainees)


def trainee(ctx, model: torch.nn.Module, optim: Optim) -> Trainee:
    return Trainee(ctx.workers, model, optim, 10, ModelFlops(0, 0, 1.0, 0))


def train(saved: Checkpoints, first: int, last: int) -> None:
    for step in range(first, last):
        for trainee in saved.trainees.values():
            (trainee.module(torch.full((2, 4), step + 1.0)) - 3).square().mean().backward()
            trainee.update(step)
        saved.save(step + 1)


def snapshot(saved: Checkpoints) -> dict[str, torch.Tensor]:
    found = {}
    for name, trainee in saved.trainees.items():
        found |= {f"{name} {key}": value.clone() for key, value in trainee.engine.saved()}
    return found


def weights(saved: Checkpoints) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in saved.trainees["policy"].engine.saved(moments=False)}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def middle_of(path: Path, content: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: -len(content) - 4] + content + whole[-4:])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(min(tensors))
    write_tensors(path, tensors)


def of_another_shape(path: Path) -> None:
    write_tensors(path, {name: torch.cat([t, t]) if t.ndim else t for name, t in load_file(path).items()})


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
    "without sums": lambda path: save_file(load_file(path), path),
    "without a tensor": without_a_tensor,
    "of another model": of_another_shape,
}
STATE_DAMAGES = {
    "missing": lambda path: path.unlink(),
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a list": lambda path: path.write_text("[1]"),
    "without state": lambda path: path.write_text('{"step": 2, "seconds": 1}'),
    "null": lambda path: path.write_text('{"step": 2, "seconds": null, "state": {}}'),
    "nested": lambda path: path.write_text("[" * 100_000),
    "of another step": lambda path: path.write_text('{"step": 1, "seconds": 1, "state": {}}'),
}
DAMAGES = [
    pytest.param(file, damage, id=f"{file}: {kind}")
    for file in ("policy.safetensors", "critic.safetensors")
    for kind, damage in FILE_DAMAGES.items()
] + [pytest.param("state.json", damage, id=f"state: {kind}") for kind, damage in STATE_DAMAGES.items()]


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


def test_without_its_best_weights_a_checkpoint_is_of_no_use(ctx, capsys):
    made = checkpoints(ctx)
    train(made, 0, 1)
    made.keep_best("policy", 0.5, higher_is_better=False)
    train(made, 1, 2)
    best = ctx.dir.checkpoints / "best" / "policy.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    with pytest.raises(Infrastructure, match=r"best weights .* cannot be read"):
        made.load_best("policy")
    assert checkpoints(ctx).restore() == 1, "which knew of no best yet"
    assert "policy.safetensors" in capsys.readouterr().err


def test_the_best_weights_come_back(ctx):
    made = checkpoints(ctx)
    for step, score in enumerate((0.7, 0.4, 0.6)):
        train(made, step, step + 1)
        made.keep_best("policy", score, higher_is_better=False)
        if score == 0.4:
            best = weights(made)
    made.load_best("policy")
    assert same(weights(made), best)


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

    monkeypatch.setattr("trainers.core.checkpoint.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        saved.keep_best("policy", 1.0, higher_is_better=True) if best else saved.save(1)
    assert list(ctx.dir.checkpoints.rglob("*")) == []
