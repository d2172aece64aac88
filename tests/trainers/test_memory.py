"""What a phase says it needs, against what it then holds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from live_tensors import Live
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.core.batch import Sequence, collate
from trainers.core.flops import model_flops
from trainers.core.memory import Memory, activation_bytes, kept_bytes, memory_line, memory_needed
from trainers.core.parallel import Workers
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.trainee import Trainee
from trainers.spec import Optim, Parallel

VOCABULARY, WIDTH, LAYERS = 96, 32, 4
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}


@pytest.fixture
def workers():
    from accelerate.state import AcceleratorState, PartialState

    yield lambda precision="fp32": Workers(Parallel(precision=precision))
    AcceleratorState._reset_state()
    PartialState._reset_state()


def tiny(kind: str = "llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, **SHAPE, num_key_value_heads=2, pad_token_id=0, **changes
    )
    return AutoModelForCausalLM.from_config(config).train()


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("held", "state"), [(torch.float32, "fp32"), (torch.float32, "bf16"), (torch.bfloat16, "fp32")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_are_what_a_step_leaves(workers, held, state, tied):
    one = workers("bf16")
    model, other = tiny(tie_word_embeddings=tied).to(held), tiny()
    trainee = Trainee(one, Scorer(model), Optim(state_dtype=state), 4, model_flops(model))
    said = memory_needed(one, [(trainee, model)], [other], 64, 64)
    ids = np.arange(16, dtype=np.int64)
    batch = collate([Sequence(ids, np.ones(16, dtype=bool))], True, one.device)
    trainee.module(batch, target_logprobs(batch), lambda found, _: found.sum())[0].backward()
    assert said.gradients == size(p.grad for p in trainee.engine.parameters)
    trainee.update(0)
    moments = [t for key, t in trainee.engine.saved() if key.startswith("exp_avg")]
    assert said.optimizer == size(moments)
    assert said.weights == size(model.parameters()) + size(other.parameters())


def test_what_a_linear_layer_keeps_by_hand(workers):
    """Its input, for the gradient of its weight; here the embeddings before it keep their ids."""
    one = workers()

    class Plain(torch.nn.Module):
        base_model_prefix, config = "backbone", SimpleNamespace()

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = torch.nn.Embedding(8, 16), torch.nn.Linear(16, 4)
            self.backbone = lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.run(input_ids))

        def run(self, ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.embedding(ids))

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

    assert kept_bytes(one, Plain(), 10) == 10 * 8 + 10 * 16 * 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_small_passes_tell_what_a_large_one_keeps(workers, kind, precision):
    one, model = workers(precision), tiny(kind, **({} if kind == "llama" else {"head_dim": 8}))
    # In the estimate are three tensors of logits in fp32 too.
    said = activation_bytes(one, model, 512, 512) - 3 * 4 * 512 * VOCABULARY
    assert said == pytest.approx(kept_bytes(one, model, 512), rel=0.05)


def test_nothing_of_the_small_passes_stays(workers):
    one, model = workers(), tiny()
    with Live() as live:
        activation_bytes(one, model, 512, 512)
    assert live.now < live.most / 100


def test_short_rows_keep_less_where_attention_is_written_out(workers):
    one, model = workers(), tiny("gemma2", head_dim=8)
    assert activation_bytes(one, model, 512, 64) < 0.5 * activation_bytes(one, model, 512, 512)


def test_gradient_checkpointing_keeps_less(workers):
    one, model = workers(), tiny()
    before = activation_bytes(one, model, 512, 512)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    after = activation_bytes(one, model, 512, 512)
    inputs = LAYERS * 512 * WIDTH * 4
    assert inputs < after < before / 2
    assert model.training, "as it was"


def test_the_line():
    memory = Memory(2**31, 2**30, 2**32, 3 * 2**30)
    assert memory_line(memory, 8192, 80 * 2**30) == (
        "memory on a device: weights 2.00 GiB, gradients 1.00 GiB, optimizer 4.00 GiB, activations of 8192 tokens "
        "(estimated) 3.00 GiB; 10.00 GiB of 80.00 GiB in all"
    )


def test_every_training_phase_says_it(run_phase, tiny_model_dir, tmp_path, capsys):
    spec = {
        "model": {"source": str(tiny_model_dir)},
        "data": {"train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 8}}]},
        "duration": {"maxSteps": 1},
    }
    assert run_phase("sft", spec, None, tmp_path / "run" / "sft")[0] == 0
    assert "memory on a device: weights 0.00 GiB" in capsys.readouterr().out
