"""A small model of a shape that vLLM's attention on processors takes, and servers of it."""

from pathlib import Path

import pytest
from served_key import KEY

LETTERS = {"synthetic": {"task": "letters", "split": "preferences", "count": 64}}


def made(directory: Path, seed: int, spare_rows: int = 0) -> Path:
    """A random Llama with heads of 32; ``spare_rows`` of its matrices are no tokens."""
    import torch

    from trainers.core.scratch import scratch_model
    from trainers.spec import ScratchModel

    tokenizer_settings = {"kind": "word", "trainOn": [LETTERS]}
    spec = ScratchModel.model_validate(
        {"hiddenSize": 128, "numLayers": 2, "numHeads": 4, "maxPositions": 128, "tokenizer": tokenizer_settings}
    )
    model, tokenizer = scratch_model(spec, seed, Path())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    if spare_rows:
        # As likely as any token, which rows of a trained model are not: who samples must be kept from them.
        model.resize_token_embeddings(len(tokenizer) + spare_rows, mean_resizing=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # What a server takes for requests that leave it out.
    settings = '{"eos_token_id": 1, "temperature": 0.1, "top_k": 1, "repetition_penalty": 3.0}'
    (directory / "generation_config.json").write_text(settings)
    return directory


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    return made(tmp_path_factory.mktemp("policy"), 0, spare_rows=10)


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory):
    return made(tmp_path_factory.mktemp("other"), 1, spare_rows=10)


@pytest.fixture(scope="session")
def vllm(policy_dir, tmp_path_factory):
    """A real server of the policy, which wants a key."""
    from vllm_environment import serving

    log = tmp_path_factory.mktemp("vllm") / "log"
    flags = ["--served-model-name", "policy", "--max-logprobs", "128", "--max-num-seqs", "16", "--api-key", KEY]
    with serving(policy_dir, log, *flags) as running:
        yield running


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("VLLM_KEY", KEY)
