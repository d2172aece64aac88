"""Whether two models mean the same by a token."""

from typing import Any


def same_tokens(teacher: Any, student: Any) -> str | None:
    """Why the student's tokenizer cannot serve the teacher's, or None. Ids must mean the same text in both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    wrong = [token for token, index in theirs.items() if ours.get(token) != index]
    if wrong:
        return f"{len(wrong)} of the teacher's {len(theirs)} tokens have another id or none, for example {wrong[0]!r}"
    if teacher.eos_token_id != student.eos_token_id:
        return f"the end token is {student.eos_token!r}, the teacher's is {teacher.eos_token!r}"
    if teacher.chat_template != student.chat_template:
        return "the chat templates differ"
    return None
