"""Reward models that are read by their own forward: BERT, DeBERTa and their like, which score a text as a whole.

What a score is made of (a pooled first token, a mean, several layers) is the architecture's own affair. So it gets
what its own tokenizer makes of question and answer, with its separators, token types and padding mask.
"""

from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import torch

from trainers.contract import BadInput
from trainers.core.batch import plan_micro_batches
from trainers.core.models import LoadedModel, context_length
from trainers.core.parallel import Workers
from trainers.core.templates import Messages, check_no_tools, renderer

Encoded = Mapping[str, list[int]]
"""What a tokenizer makes of one text: `input_ids`, and whatever else its model reads."""


@dataclass
class TextClassifier:
    """A one-label classifier of texts, frozen, with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def max_length(self) -> int:
        """Tokens that it reads. Where positions count from behind the padding's (RoBERTa), these are fewer."""
        embeddings = getattr(getattr(self.model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(embeddings, "padding_idx", None)
        positions = context_length(self.model) - (0 if padding is None else padding + 1)
        return min(positions, self.tokenizer.model_max_length)

    def encoded(self, prompt: Messages, response: str, max_length: int) -> Encoded:
        """A conversation by the chat template, if there is one; else question and answer as a pair of texts.

        Too long a question loses its left end, and too long an answer its right.
        """
        max_length = min(max_length, self.max_length)
        if self.tokenizer.chat_template is not None:
            text = renderer(self.tokenizer)([*prompt, {"role": "assistant", "content": response}], False)
            marked = text.startswith(self.tokenizer.cls_token or self.tokenizer.bos_token or "\0")
            return self._cut(text, None, max_length, add_special_tokens=not marked)
        room = max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - 1
        return self._cut(question(prompt), self._start(response, room), max_length)

    def _start(self, text: str, tokens: int) -> str:
        """A text as far as it has so many tokens."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(found) <= tokens else text[: found[tokens - 1][1]]

    def _cut(self, text: str, pair: str | None, max_length: int, **options: Any) -> Encoded:
        self.tokenizer.truncation_side = "left"
        cut = True if pair is None else "only_first"
        found: Encoded = dict(self.tokenizer(text, pair, truncation=cut, max_length=max_length, **options))
        return found


def question(prompt: Messages) -> str:
    """What is answered, as text: a single message as it is, several with who says them. Raises BadInput for tools."""
    check_no_tools(prompt)
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)


RewardModel = LoadedModel | TextClassifier
"""What gives a response its score."""


@torch.no_grad()
def text_scores(
    workers: Workers, classifier: TextClassifier, texts: List[Encoded], micro_batch_tokens: int = 8192
) -> torch.Tensor:
    """Scores of this process's texts: (S,) on the CPU in fp32, in the order given.

    Computed in the weights' own type, without autocast: these models are small, and all of them is the head.
    """
    scores = torch.empty(len(texts))
    for chosen in plan_micro_batches([[len(t["input_ids"])] for t in texts], micro_batch_tokens, packing=False)[0]:
        batch = classifier.tokenizer.pad(
            [dict(texts[i]) for i in chosen], padding_side="right", return_tensors="pt", verbose=False
        )
        batch = {name: value.to(workers.device) for name, value in batch.items()}
        scores[chosen] = classifier.model(**batch).logits[:, 0].float().cpu()
    return scores


def check_text_scores(workers: Workers, classifier: TextClassifier) -> None:
    """Raise BadInput if a text's score depends on those beside it, or does not depend on the text at all."""
    texts = [classifier.encoded([{"role": "user", "content": q}], "yes " * n, 64) for q, n in (("a", 1), ("b c", 9))]
    together = text_scores(workers, classifier, texts)
    alone = torch.cat([text_scores(workers, classifier, [text]) for text in texts])
    kind = classifier.model.config.model_type
    if not torch.allclose(together, alone, atol=1e-3, rtol=1e-3):
        raise BadInput(f"reward models of type {kind} cannot be used: a score depends on how much padding is beside it")
