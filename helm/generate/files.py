"""Which files are generated, writing them, and telling of drift."""

from pathlib import Path

from generate.alerts import alerts_yaml
from generate.chart import chart_files
from generate.crd import crd_yaml
from generate.dashboards import dashboard_files
from generate.docs import metrics_page, run_page
from generate.rbac import rbac_yaml
from generate.schema import fragment_schema, run_schema, schema_json

ROOT = Path(__file__).resolve().parents[2]
CHART = "helm/alignment-operator"


def generated() -> dict[str, str]:
    """Path in the repository to content."""
    return {
        "manifests/base/crd.yaml": crd_yaml(),
        f"{CHART}/files/crd.yaml": crd_yaml(),
        f"{CHART}/files/rbac.yaml": rbac_yaml(),
        f"{CHART}/files/alerts.yaml": alerts_yaml(),
        **{f"{CHART}/{path}": text for path, text in chart_files(ROOT / CHART).items()},
        "configs/schema/alignmentrun.json": schema_json(run_schema()),
        "configs/schema/fragment.json": schema_json(fragment_schema()),
        "docs/reference/alignmentrun.md": run_page(),
        "docs/reference/metrics.md": metrics_page(),
        **dashboard_files(),
    }


def drift(root: Path) -> list[str]:
    """Files whose content is not what the models say."""
    return [
        path for path, text in generated().items() if not (root / path).exists() or (root / path).read_text() != text
    ]
