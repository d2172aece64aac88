"""The examples of real families, from end to end: their real tokenizers and templates, on tiny random weights and few rows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_tokenizers
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "configs/examples"
ALIGNCTL = str(Path(sys.executable).parent / "alignctl")
TRAINING = ("sft", "reward", "dpo", "ppo", "distill")

pytestmark = pytest.mark.slow

SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def tiny_model(family: str, folder: Path, seed: int, **tokens: str | None) -> None:
    """Random weights behind a family's own tokenizer; ``tokens``: as the base model's files name them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(real_tokenizers.folder(family))
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    config, kind = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama3_1": (LlamaConfig, LlamaForCausalLM)}[family]
    torch.manual_seed(seed)
    kind(config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SIZE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(folder: Path) -> None:
    """As the examples' datasets have them."""
    asked = [{"role": "user", "content": f"What is {i} and {i}?"} for i in range(16)]
    good = [{"role": "assistant", "content": f"It is {2 * i}.\n\nAnything else?"} for i in range(16)]
    bad = [{"role": "assistant", "content": "No."}] * 16
    talk = [[q, a, {"role": "user", "content": "Sure?"}, b] for q, a, b in zip(asked, good, bad, strict=True)]
    tables: dict[str, list[dict[str, Any]]] = {
        "pairs": [
            {"prompt": q["content"], "chosen": [q, a], "rejected": [q, b], "score_chosen": 8.0}
            for q, a, b in zip(asked, good, bad, strict=True)
        ],
        "talks": [{"prompt": turns[0]["content"], "messages": turns} for turns in talk],
    }
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def small(document: dict[str, Any]) -> dict[str, Any]:
    """The example with tiny models, local rows, and two steps a phase."""
    models = {
        "Qwen/Qwen3-4B": "qwen3-instruct",
        "Qwen/Qwen3-0.6B-Base": "qwen3-base",
        "meta-llama/Llama-3.1-8B": "llama3-base",
        "meta-llama/Llama-3.2-1B": "llama3-base",
    }

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "hub" in value:
            name = "pairs" if value.get("format") == "preference-messages" else "talks"
            return {**{key: value[key] for key in value if key != "hub"}, "files": f"{name}.jsonl"}
        found = {key: change(item) for key, item in value.items() if key != "gates"}
        return found | ({"source": models[value["source"]]} if "source" in value else {})

    run = change(document)
    run["spec"]["template"] = {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}
    for phase in run["spec"]["phases"]:
        for kind, spec in phase.items():
            if kind in TRAINING:
                spec.update(batchSize=8, **({"iterations": 2} if kind == "ppo" else {"duration": {"maxSteps": 2}}))
            if kind != "name" and "sampling" in spec:
                spec["sampling"]["maxNewTokens"] = 8
            if kind == "evaluate":
                spec["latency"] = {"enabled": False}
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES / "templates", found / "templates")
    rows(found)
    tiny_model("qwen3", found / "qwen3-instruct", 0)
    tiny_model("qwen3", found / "qwen3-base", 1, eos_token="<|endoftext|>")
    tiny_model("llama3_1", found / "llama3-base", 2, eos_token="<|end_of_text|>", chat_template=None)
    return found


def alignctl(command: str, *arguments: str) -> str:
    done = subprocess.run(
        [ALIGNCTL, command, *arguments], capture_output=True, text=True, timeout=900, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "end"), [("qwen3", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_an_example_runs_and_its_student_ends_its_turns(name: str, end: str, folder: Path):
    from transformers import AutoTokenizer, GenerationConfig

    example = EXAMPLES / f"{name}.yaml"
    alignctl("validate", str(example))
    run = folder / f"{name}.yaml"
    run.write_text(yaml.safe_dump(small(yaml.safe_load(example.read_text()))))
    workspace = folder / "runs"
    alignctl("plan", str(run), "--workspace", str(workspace))
    alignctl("run", str(run), "--workspace", str(workspace))

    model = workspace / name / "distill" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    stops = GenerationConfig.from_pretrained(model).eos_token_id
    assert tokenizer.convert_tokens_to_ids(end) in (stops if isinstance(stops, list) else [stops])
    asked = [{"role": "user", "content": "Hello?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith({"qwen3": "<think>\n\n</think>\n\n", "llama3": "<|end_header_id|>\n\n"}[name])
    assert (workspace / name / "package" / "report.html").is_file()
