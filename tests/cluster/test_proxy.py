"""The fault proxy: what passes, what breaks, and that a watch really freezes."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from cluster.client import Cluster
from cluster.proxy import FaultProxy


@pytest.fixture
def proxy(api_cluster: Cluster) -> Iterator[FaultProxy]:
    with FaultProxy(api_cluster.kubeconfig) as proxy:
        yield proxy


@pytest.fixture
def configmaps(api_cluster: Cluster) -> str:
    return f"/api/v1/namespaces/{api_cluster.namespace('proxy')}/configmaps"


def call(proxy: FaultProxy, method: str, path: str, body: dict | None = None) -> dict:
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(proxy.url + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def configmap(name: str) -> dict:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}


class Watch(threading.Thread):
    """Names of the events of one watch, as they come."""

    def __init__(self, proxy: FaultProxy, path: str):
        super().__init__(daemon=True)
        self.names: list[str] = []
        self.ended = threading.Event()
        self.answer = urllib.request.urlopen(f"{proxy.url}{path}?watch=true", timeout=30)
        self.start()

    def run(self) -> None:
        try:
            for line in self.answer:
                self.names.append(json.loads(line)["object"]["metadata"]["name"])
        except OSError:
            pass
        self.ended.set()


def test_requests_pass_with_the_rights_of_the_kubeconfig(proxy: FaultProxy, configmaps: str) -> None:
    call(proxy, "POST", configmaps, configmap("one"))
    assert "one" in [item["metadata"]["name"] for item in call(proxy, "GET", configmaps)["items"]]
    assert [one.status for one in proxy.seen("POST")] == [201]


def test_kubectl_works_through_it(api_cluster: Cluster, proxy: FaultProxy) -> None:
    assert "kube-system" in api_cluster.kubectl(f"--kubeconfig={proxy.kubeconfig}", "get", "namespaces")


@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_an_answer_of_its_own_for_the_chosen_requests(proxy: FaultProxy, configmaps: str, status: int) -> None:
    rule = proxy.answer(status, method="POST", path="/configmaps", retry_after=7)
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(proxy, "POST", configmaps, configmap("two"))
    assert (refused.value.code, refused.value.headers["Retry-After"]) == (status, "7")
    assert json.load(refused.value)["code"] == status
    call(proxy, "POST", configmaps, configmap("two"))
    assert rule.hits == 1


def test_a_lost_answer_is_carried_out_and_a_refused_request_is_not(proxy: FaultProxy, configmaps: str) -> None:
    for fault, name in ((proxy.lose_answer, "lost"), (proxy.refuse, "refused")):
        fault(method="POST")
        with pytest.raises(OSError, match=r"(?i)remote|reset"):
            call(proxy, "POST", configmaps, configmap(name))
    names = [item["metadata"]["name"] for item in call(proxy, "GET", configmaps)["items"]]
    assert "lost" in names
    assert "refused" not in names
    assert [one.status for one in proxy.seen("POST")] == [0, 0]


def test_a_frozen_watch_is_silent_while_other_requests_pass(
    api_cluster: Cluster, proxy: FaultProxy, configmaps: str
) -> None:
    watch = Watch(proxy, configmaps)
    call(proxy, "POST", configmaps, configmap("before"))
    api_cluster.wait(lambda: "before" in watch.names, 10, "the first event")
    proxy.freeze_watches()
    call(proxy, "POST", configmaps, configmap("during"))
    assert not watch.ended.wait(1)
    assert "during" not in watch.names
    proxy.thaw_watches()
    api_cluster.wait(lambda: "during" in watch.names, 10, "the frozen event")


def test_broken_streams_and_an_unreachable_server(api_cluster: Cluster, proxy: FaultProxy, configmaps: str) -> None:
    watch = Watch(proxy, configmaps)
    rule = proxy.break_everything()
    assert watch.ended.wait(10)
    with pytest.raises(OSError, match=r"(?i)remote|reset"):
        call(proxy, "GET", configmaps)
    proxy.remove(rule)
    call(proxy, "GET", configmaps)


def test_a_delay_delays(proxy: FaultProxy, configmaps: str) -> None:
    proxy.delay(1, method="GET")
    call(proxy, "GET", configmaps)
    call(proxy, "GET", configmaps)
    first, second = proxy.seen("GET")
    assert second.at - first.at < 1
