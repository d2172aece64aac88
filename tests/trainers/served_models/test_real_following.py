"""PPO whose samples a real vLLM makes with the policy's weights of each round: it learns what it learns without, as fast."""

import json
import statistics
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from vllm_environment import SETTINGS, vllm_command

pytestmark = pytest.mark.vllm

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 24}}], "maxPromptLength": 32}
ROUNDS = 10


def spec_for(policy: Path, reward: Path, seed: int, **served):
    return {
        "policy": {"source": str(policy)},
        "rewardModel": {"source": str(reward)},
        "data": PROMPTS,
        "iterations": ROUNDS,
        "batchSize": 24,
        "ppoEpochs": 2,
        "sampling": {"maxNewTokens": 8, **served.pop("sampling", {})},
        "optim": {"lr": 2e-3},
        "criticOptim": {"lr": 2e-3},
        "kl": {"coef": 0.0},
        "missingEosPenalty": 3.0,
        "seed": seed,
        **served,
    }


def lines(output: Path):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def learnt(found) -> float:
    """Share of responses that end, over all rounds: the area under the curve. Ending is what is rewarded."""
    return statistics.fmean(line["ended_share"] for line in found)


def left_behind() -> list[psutil.Process]:
    """Processes of a server that follows."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "VLLM_SERVER_DEV_MODE" in process.environ():
                found.append(process)
    return found


def test_ppo_learns_as_it_does_without(run_phase, policy_dir, tiny_reward_dir, tmp_path, monkeypatch):
    own = []
    for seed in range(3):
        assert run_phase("ppo", spec_for(policy_dir, tiny_reward_dir, seed), None, tmp_path / f"{seed}" / "ppo")[0] == 0
        own.append(learnt(lines(tmp_path / f"{seed}" / "ppo")))
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    server = {"command": vllm_command(), "args": ["--enforce-eager", "--max-num-seqs", "16"]}
    spec = spec_for(policy_dir, tiny_reward_dir, 9, server=server, sampling={"engine": "vllm"})
    assert run_phase("ppo", spec, None, tmp_path / "vllm" / "ppo")[0] == 0
    found = lines(tmp_path / "vllm" / "ppo")
    assert found[-1]["ended_share"] > found[0]["ended_share"] + 0.4, "it learns"
    noise = statistics.stdev(own)
    assert abs(learnt(found) - statistics.fmean(own)) < 4 * noise + 0.05, (learnt(found), own)
    assert max(line["mismatch"] for line in found) < 1e-4, "weights are those of the round: rounding alone is left"
    assert not left_behind()


@pytest.mark.soak
def test_samples_ahead_are_one_round_old_and_learn_too(run_phase, policy_dir, tiny_reward_dir, tmp_path, monkeypatch):
    """The server makes the next round's samples while this one is learned from: their mismatch is a round's change, no more."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    server = {"command": vllm_command(), "args": ["--enforce-eager", "--max-num-seqs", "16"]}
    spec = spec_for(policy_dir, tiny_reward_dir, 9, staleness=1)
    assert run_phase("ppo", spec, None, tmp_path / "own" / "ppo")[0] == 0
    spec = spec_for(policy_dir, tiny_reward_dir, 9, staleness=1, server=server, sampling={"engine": "vllm"})
    assert run_phase("ppo", spec, None, tmp_path / "vllm" / "ppo")[0] == 0
    own, found = lines(tmp_path / "own" / "ppo"), lines(tmp_path / "vllm" / "ppo")
    apart = [line["mismatch"] for line in found]
    print("mismatch", apart, "of copies", [line["mismatch"] for line in own], "learnt", learnt(found), learnt(own))
    assert [line["staleness"] for line in found] == [0, *[1] * (ROUNDS - 1)]
    assert apart[0] < 1e-4 < min(apart[1:]) < max(apart) < 3 * max(line["mismatch"] for line in own)
    assert found[-1]["ended_share"] > found[0]["ended_share"] + 0.4, "it learns"
    assert not left_behind()
