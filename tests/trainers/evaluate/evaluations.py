"""What is measured of tiny models, and what of it is left."""

import json

import torch

ROWS = {"rows": [{"synthetic": {"task": "letters", "split": "test", "count": 24}}], "maxPromptLength": 32}
LATENCY = {"promptLengths": [8], "newTokens": 4, "batchSizes": [1, 4], "repeats": 2}
GREEDY = {"maxNewTokens": 6, "temperature": 0}
BENCHMARKS = [
    {"name": "answers", "accuracy": {}},
    {"name": "safety", "safety": {"refusalPattern": r"^(sorry|no)\b"}},
    {"name": "style", "style": {"pattern": "help"}},
    {"name": "judge", "reward": {}},
    {"name": "drift", "kl": {}},
    {"name": "fit", "perplexity": {}},
    {"name": "length", "length": {}},
    {"name": "greedy", "headline": False, "accuracy": {"sampling": GREEDY}},
]


def document(root, name="results.json"):
    return json.loads((root / name).read_text())


def replies(root, model, benchmark="answers"):
    lines = (root / "responses" / f"{model}.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if benchmark in row["benchmarks"]]


def copy_of(source, target, change):
    """A model's folder with its weights or its tokenizer changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        change(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)
