"""AlignmentRuns that nobody would write: shipped ones changed at random places of the schema, mostly sensible, some hostile."""

import copy
import random
from pathlib import Path
from typing import Any

import yaml
from driver import ROOT

Object = dict[str, Any]

WORDS = (
    "sft", "dpo", "reward", "letters", "a", "A", "0", "1Gi", "500m", "1e99", "1e999999999", "2026-02-30", "s3://bucket/folder",
    "../..", "/", "/data", "x y", "ß", "a\nb", "\x1b[31m", "%", "{}", "*.jsonl", "-", "a" * 64, "a" * 5000, "",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 7, 64, 4096, 2**31, 2**63 - 1, 1e-9, 0.5, 1e300, -1e300)
DEPTH = 6
SHIPPED = sorted((ROOT / "manifests/samples").glob("*.yaml")) + sorted((ROOT / "configs/examples").glob("*.yaml"))


def _runs(path: Path) -> list[Object]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one and one.get("kind") == "AlignmentRun"]


class Generator:
    """The same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.bases = [run for path in SHIPPED for run in _runs(path)]
        crd = yaml.safe_load((ROOT / "manifests/base/crd.yaml").read_text())
        self.schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]

    def run(self, name: str) -> Object:
        spec = copy.deepcopy(self.chance.choice(self.bases)["spec"])
        spec.setdefault("workspace", {"claimName": "work"})
        spec.setdefault("template", {}).setdefault("image", "nothing:1")
        for _ in range(self.chance.randrange(4)):
            spec = self._changed(self.schema, spec)
        return {
            "apiVersion": "alignment.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": name}, "spec": spec,
        }  # fmt: skip

    def _changed(self, schema: Object, found: Any) -> Any:
        """With one place of it another."""
        if isinstance(found, dict) and (known := schema.get("properties")):
            return self._another_field(known, found)
        if isinstance(found, list) and (items := schema.get("items")):
            return self._another_item(items, found)
        return self._value(schema)

    def _another_field(self, known: Object, found: Object) -> Object:
        there = [name for name in found if name in known]
        name = self.chance.choice(there if there and self.chance.random() < 0.7 else sorted(known))
        if name not in found:
            return {**found, name: self._value(known[name])}
        if self.chance.random() < 0.1:
            return {key: value for key, value in found.items() if key != name}
        return {**found, name: self._changed(known[name], found[name])}

    def _another_item(self, items: Object, found: list[Any]) -> list[Any]:
        if not found or self.chance.random() < 0.2:
            return [*found, self.chance.choice(found) if found and self.chance.random() < 0.5 else self._value(items)]
        place = self.chance.randrange(len(found))
        if self.chance.random() < 0.1:
            return [item for index, item in enumerate(found) if index != place]
        return [self._changed(items, item) if index == place else item for index, item in enumerate(found)]

    def _value(self, schema: Object, depth: int = 0) -> Any:
        """One more likely to be of the schema than not."""
        if self.chance.random() < 0.02:
            return self.chance.choice([None, [], {}, True, "x", 1])
        if "enum" in schema:
            return self.chance.choice(schema["enum"])
        kinds = {"object": self._object, "array": self._array, "boolean": self._boolean}
        if made := kinds.get(schema.get("type", "")):
            return made(schema, depth + 1)
        is_number = schema.get("type") in ("integer", "number")
        return self._number(schema) if is_number else self.chance.choice(WORDS)

    def _object(self, schema: Object, depth: int) -> Object:
        known, required = schema.get("properties", {}), set(schema.get("required", ()))
        some = {name for name in sorted(known) if depth < DEPTH and self.chance.random() < 2 / (2 + len(known))}
        made = {name: self._value(known[name], depth) for name in sorted(required | some)}
        of_any_name = schema.get("additionalProperties")
        if isinstance(of_any_name, dict):
            made |= {self.chance.choice(WORDS): self._value(of_any_name, depth)}
        return made

    def _array(self, schema: Object, depth: int) -> list[Any]:
        count = self.chance.choice([0, 1, 1, 2]) if depth < DEPTH else 0
        return [self._value(schema["items"], depth) for _ in range(count)]

    def _boolean(self, schema: Object, depth: int) -> bool:
        return self.chance.random() < 0.5

    def _number(self, schema: Object) -> float:
        """At the edges of what is allowed, or anywhere."""
        edges = [schema[edge] for edge in ("minimum", "maximum") if edge in schema]
        number = self.chance.choice([*NUMBERS, *edges, *(edge + 1 for edge in edges), *(edge - 1 for edge in edges)])
        return int(number) if schema.get("type") == "integer" and abs(number) < 2**63 else number
