"""Runs that are refused when they are applied, or told at once what is wrong with them."""

import json

import pytest
from cluster.client import KubectlError
from driver import ROWS, Driver, dpo, manifest, sft


class TestRefusals:
    """At `kubectl apply`, by the CRD alone."""

    CASES = {
        "two members": ({"name": "x", "sft": {"data": ROWS}, "dpo": dpo()["dpo"]}, "a phase has exactly one of"),
        "a reference to nothing": (dpo("x", on="nobody"), "dpo.policy.phase: not a phase of this run"),
        "itself": (dpo("x", on="x"), "dpo.policy.phase: a phase cannot refer to itself"),
        "a field of the wrong kind": (sft("x", batchSize="many"), "batchSize"),
        "a value out of bounds": (dpo("x", beta=-1), "beta"),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_at_apply(self, driver: Driver, name: str):
        phase, message = self.CASES[name]
        with pytest.raises(KubectlError) as caught:
            driver.apply(manifest("run", sft(), phase))
        assert message in str(caught.value)

    SPECS = {
        "a quantity that is none": (
            {"template": {"resources": {"limits": {"memory": "64 GB"}}}},
            "template.resources.limits.memory",
        ),
        "a variable that cannot be": ({"template": {"env": [{"name": "A B", "value": "x"}]}}, "template.env[0].name"),
        "an image that cannot be": ({"template": {"image": "My Image"}}, "template.image"),
        "no address": ({"workspace": {"uri": "bucket/prefix"}}, "workspace.uri"),
        "two workspaces": ({"workspace": {"uri": "s3://b/p", "claimName": "c"}}, "set exactly one of claimName, uri"),
        "no source of rows": (
            {"phases": [sft(data={"train": [{"limit": 3}]})]},
            "set exactly one of files, hub, synthetic",
        ),
        "no source of a model": ({"model": {"revision": "main"}}, "set exactly one of phase, source, scratch"),
        "no pods": ({"template": {"nodes": 0}}, "template.nodes"),
    }

    @pytest.mark.parametrize("name", SPECS)
    def test_at_apply_outside_the_phases(self, driver: Driver, name: str):
        spec, message = self.SPECS[name]
        with pytest.raises(KubectlError) as caught:
            driver.apply(manifest("run", sft(), **spec))
        assert message in str(caught.value)

    @pytest.mark.parametrize("name", ["a.b", "Upper", "x" * 41])
    def test_names_that_jobs_cannot_be_named_after(self, driver: Driver, name: str):
        with pytest.raises(KubectlError, match=r"metadata\.name"):
            driver.apply(manifest(name, sft()))

    def test_an_unknown_field_is_refused(self, driver: Driver):
        run = json.dumps(manifest("run", sft("x", learningRate=1)))
        with pytest.raises(KubectlError, match="learningRate"):
            driver.cluster.kubectl("create", "-n", driver.namespace, "--validate=strict", "-f", "-", input=run)

    def test_a_loop_is_told_on_the_run(self, driver: Driver):
        driver.apply(manifest("run", dpo("a", on="b"), dpo("b", on="a")))
        accepted = driver.until_condition("run", "Accepted", "False")
        assert "these phases wait for each other: a -> b -> a" in accepted["message"]
        driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace)

    def test_a_run_without_a_workspace_or_image_is_told_so(self, driver: Driver):
        run = manifest("run", sft())
        del run["spec"]["workspace"], run["spec"]["template"]
        driver.apply(run)
        accepted = driver.until_condition("run", "Accepted", "False")
        assert "spec.workspace: is not set" in accepted["message"]
        assert "spec.phases[sft].template.image: is not set" in accepted["message"]
        driver.patch("run", {"workspace": {"claimName": "w"}, "template": {"image": "i:1"}})
        driver.until_job("run-sft-1")
        assert driver.condition("run", "Accepted")["status"] == "True"
