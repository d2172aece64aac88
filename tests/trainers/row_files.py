"""Files of rows, and reading them."""

import gzip
import json

from trainers.core.rows import read_rows
from trainers.spec import DataSource, RowPolicy

GOOD = {"prompt": "p", "response": "r"}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)


def read(tmp_path, schema="sft", on_malformed="stop", **source):
    found = DataSource.model_validate({"files": "d.jsonl"} | source if "hub" not in source else source)
    return read_rows([found], schema, tmp_path, RowPolicy(on_malformed=on_malformed), "data.train")
