"""What a run says about the conversations of a model: template, options, date, end token."""

import datetime
from pathlib import Path
from typing import Any

from trainers.contract import BadInput
from trainers.core.templates import template_of, variables, with_settings
from trainers.spec import LARGEST_TEMPLATE, ChatSettings


def apply_chat_settings(tokenizer: Any, settings: ChatSettings, base_dir: Path) -> None:
    """Change a tokenizer as its model's reference says. What is set is saved with the model, and so goes on with it.

    Raises BadInput for a template that is not there, options without template or that it never
    reads, an end token that is no token.
    """
    if settings.chat_template is not None:
        tokenizer.chat_template = _text(settings, base_dir)
    if settings.template_options or settings.template_date is not None:
        template = template_of(tokenizer)
        if template is None:
            raise BadInput("templateOptions and templateDate: the model has no chat template; set chatTemplate")
        _check_options(tokenizer, settings)
        day = datetime.date.fromisoformat(settings.template_date) if settings.template_date else None
        tokenizer.chat_template = with_settings(template, settings.template_options, day)
    if settings.end_token is not None:
        if settings.end_token not in tokenizer.get_vocab():
            raise BadInput(f"endToken: {settings.end_token!r} is no token of the model's vocabulary")
        tokenizer.eos_token = settings.end_token


def _check_options(tokenizer: Any, settings: ChatSettings) -> None:
    known = variables(tokenizer) if settings.template_options else []
    for name in settings.template_options:
        if name not in known:
            there = ", ".join(known) or "no variable that an option could set"
            raise BadInput(f"templateOptions.{name}: the chat template never reads it; it reads {there}")


def _text(settings: ChatSettings, base_dir: Path) -> str:
    path = settings.chat_template_file(base_dir)
    if path is None:
        return str(settings.chat_template)
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"chatTemplate: {path} is no file with a template, but a folder, pipe or device")
        if path.stat().st_size > LARGEST_TEMPLATE:
            raise BadInput(f"chatTemplate: {path} is larger than {LARGEST_TEMPLATE:,} bytes, and so no template")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"chatTemplate: {path} cannot be read ({error})") from error
