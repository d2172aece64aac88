"""`make manifests`: what manifests/ shares with the chart, rendered from it. Helm's own labels are left out."""

from collections.abc import Iterable
from typing import Any

import yaml

from chart.helm import ROOT, Object, template

NOTICE = "# Made from helm/alignment-operator by `make manifests`; do not edit.\n"
MANIFESTS = ROOT / "manifests"
HELMS_OWN = ("helm.sh/chart", "app.kubernetes.io/managed-by")
RIGHTS = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
MONITORING = ("PodMonitor", "ServiceMonitor", "PrometheusRule", "ConfigMap")


def rendered() -> dict[str, str]:
    """Path below manifests/ to content."""
    base = without_helm(template(_values("base"), "--skip-tests"))
    monitoring = without_helm(template(_values("monitoring"), "--skip-tests"))
    return {
        "base/rbac.yaml": _text(o for o in base if o["kind"] in RIGHTS),
        "base/operator.yaml": _text(o for o in base if o["kind"] not in RIGHTS),
        "monitoring/monitors.yaml": _text(o for o in monitoring if o["kind"] in MONITORING),
    }


def without_helm(objects: list[Object]) -> list[Object]:
    for labels in _labels(objects):
        for key in HELMS_OWN:
            # Trainers are selected by who manages them, which is not Helm.
            if key in labels and (key != HELMS_OWN[1] or labels[key] == "Helm"):
                del labels[key]
    return objects


def _labels(node: Any) -> Iterable[dict[str, str]]:
    if isinstance(node, list):
        for item in node:
            yield from _labels(item)
    elif isinstance(node, dict):
        for key, inner in node.items():
            if key == "labels" and isinstance(inner, dict):
                yield inner
            else:
                yield from _labels(inner)


def _values(folder: str) -> Object:
    return yaml.safe_load((MANIFESTS / folder / "values.yaml").read_text())


class _Readable(yaml.SafeDumper):
    """Long texts as they are, and nothing said once for two places."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style="|" if "\n" in s else None)
)


def _text(objects: Iterable[Object]) -> str:
    return NOTICE + yaml.dump_all(objects, Dumper=_Readable, sort_keys=False, width=120)


def main() -> None:
    for path, text in rendered().items():
        if not (MANIFESTS / path).exists() or (MANIFESTS / path).read_text() != text:
            (MANIFESTS / path).write_text(text)
            print(f"wrote manifests/{path}")


if __name__ == "__main__":
    main()
