"""What both sides compute with: models, a vocabulary, and rows of Python's own docstrings.

Models are random Llamas. A prompt is sixteen words; an answer is what follows, as long as real answers are: lognormal, 48 words
in the median, sigma 0.6, at most 160. The same Python makes the same rows.
"""

import inspect
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from trainers.core.chat import ChatFormat, chat_format
from trainers.core.order import BatchOrder
from trainers.core.scratch import scratch_tokenizer
from trainers.spec import ScratchTokenizer

PROMPT = 16
MEDIAN, SIGMA, LONGEST = 48, 0.6, 160
ROWS = 2048
WORDS = 8192
"""Of the vocabulary that the texts are written in; a model may embed more."""

MODULES = (
    "argparse asyncio calendar collections concurrent.futures csv datetime decimal difflib doctest email.message "
    "fractions ftplib functools heapq http.client imaplib inspect ipaddress itertools json logging mailbox "
    "multiprocessing.pool optparse os pathlib pickle pydoc random re shutil smtplib socket sqlite3 ssl statistics "
    "string subprocess tarfile tempfile textwrap threading tokenize turtle typing unittest.mock urllib.request uuid "
    "zipfile zoneinfo"
)


@dataclass(frozen=True)
class Size:
    """A Llama's shape."""

    hidden: int
    inner: int
    layers: int
    heads: int
    keys: int
    embedded: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.embedded, hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.keys, max_position_embeddings=1024,
            tie_word_embeddings=self.tied, bos_token_id=None, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip


SIZES = {
    "tiny": Size(64, 128, 2, 2, 2, WORDS),
    "small": Size(256, 688, 4, 4, 4, WORDS),
    "0.5B": Size(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.5B": Size(1536, 8960, 28, 12, 2, 151936, tied=True),
}
"""The two large ones have the shapes of Qwen2.5's."""


def make(folder: Path, size: Size) -> None:
    """Write rows, tokenizer and models, unless they are there."""
    if (folder / "made").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(islice(_rows(), ROWS))
    for name, keys in (
        ("sft", ("prompt", "response")),
        ("pairs", ("prompt", "chosen", "rejected")),
        ("prompts", ("prompt",)),
    ):
        _write(folder / f"{name}.jsonl", ({key: row[key] for key in keys} for row in rows))
    tokenizer = _tokenizer(folder)
    _write(folder / "tokens.jsonl", (_tokens(chat_format(tokenizer), row) for row in rows))
    _write(
        folder / "traces.jsonl",
        ({"prompt": row["prompt"], "teacher_response": row["chosen"], "reward": 0.0, "ended": True} for row in rows),
    )
    _save(LlamaForCausalLM, size.config(), folder / "model", tokenizer, 0)
    _save(LlamaForCausalLM, size.config(), folder / "teacher", tokenizer, 1)
    scores = size.config()
    scores.num_labels = 1
    _save(LlamaForSequenceClassification, scores, folder / "reward", tokenizer, 2)
    (folder / "made").touch()


def order(batch: int, steps: int) -> list[int]:
    """Numbers of the rows in the order in which ours takes them."""
    taken = BatchOrder(ROWS, batch, 1, steps, 0)
    return [number for step in range(steps) for number in taken.indices(step)]


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokens(chat: ChatFormat, row: dict[str, str]) -> dict[str, Any]:
    """What ours makes of a row, for those who take tokens; the prompt as a text too."""
    asked = [{"role": "user", "content": row["prompt"]}]
    prompt, chosen = chat.answer(asked, row["chosen"])
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": chat.answer(asked, row["rejected"])[1],
        "text": chat.prompt_text(asked),
    }


def _save(kind: Any, config: LlamaConfig, folder: Path, tokenizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    spec = ScratchTokenizer.model_validate(
        {"kind": "bytes", "vocabSize": WORDS, "trainOn": [{"files": str(folder / "pairs.jsonl")}]}
    )
    return scratch_tokenizer(spec, folder)


def _rows() -> Iterator[dict[str, str]]:
    words, drawn = cycle(_words()), random.Random(0)

    def answer() -> str:
        length = round(MEDIAN * drawn.lognormvariate(0, SIGMA))
        return " ".join(islice(words, max(4, min(length, LONGEST))))

    while True:
        prompt = " ".join(islice(words, PROMPT))
        chosen = answer()
        yield {"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": answer()}


def _words() -> list[str]:
    """Of all docstrings, in an order that mixes modules. Marks that a chat template would see are left out."""
    found = {
        " ".join((inspect.getdoc(item) or "").split())
        for name in MODULES.split()
        for item in _parts(import_module(name))
    }
    texts = sorted(found)
    random.Random(0).shuffle(texts)
    return [word for text in texts for word in text.split() if word.isascii() and not set(word) & set("<>[]{}/")]


def _parts(module: Any) -> Iterator[Any]:
    yield module
    for item in list(vars(module).values()):
        if inspect.isclass(item) or callable(item):
            yield item
        if inspect.isclass(item):
            yield from (member for member in vars(item).values() if callable(member))
