"""What becomes of a job that the API server does not make, by its answer; and which of Kueue's versions is asked."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web
from builders import START
from test_catch_up import Loopback
from test_ownership import NoFigures, a_run

from controller.backends.cluster.backend import ClusterBackend
from controller.backends.cluster.settings import Settings
from controller.kube.answers import ApiError
from controller.kube.api import Api
from controller.kube.transport import Transport
from controller.memory import Memory
from controller.plan.decide import Apply, decide
from controller.plan.job import PhaseJob
from controller.plan.observed import Observed
from trainers.contract import FailureClass

Object = dict[str, Any]
Answers = Callable[[web.Request], tuple[int, Object]]

SFT = ("sft", 1)
JOBS, KUEUE = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs", "/apis/kueue.x-k8s.io"
WALLS = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"
PLAIN, WALLED = Settings(), Settings(metrics_readers=())
NOT_FOUND = (404, {"kind": "Status", "code": 404, "reason": "NotFound", "message": "not found"})


async def served(answers: Answers, act: Callable[[Api], Coroutine[Any, Any, Any]]) -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        status, document = answers(request)
        return web.json_response(document, status=status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    transport = Transport(lambda: Loopback(f"http://127.0.0.1:{runner.addresses[0][1]}"))
    try:
        return await act(Api(transport))
    finally:
        await transport.close()
        await runner.cleanup()


def refused(
    code: int, message: str, reason: str = "", settings: Settings = PLAIN, **more: Any
) -> tuple[Observed, ApiError | None]:
    """What is seen of a run after this answer to the first creation that its first job asks for, and what was raised."""

    def answers(request: web.Request) -> tuple[int, Object]:
        if request.method == "POST":
            return code, {
                "kind": "Status",
                "status": "Failure",
                "code": code,
                "message": message,
                "reason": reason,
            } | more
        return NOT_FOUND if request.path.startswith((f"{JOBS}/", f"{WALLS}/")) else (200, {"items": []})

    async def act(api: Api) -> tuple[Observed, ApiError | None]:
        figures: Any = NoFigures()
        backend, raised = ClusterBackend(api, Memory(api), figures, settings), None
        try:
            await backend.apply(a_run(), first_job())
        except ApiError as error:
            raised = error
        return await backend.observe(a_run()), raised

    found: tuple[Observed, ApiError | None] = asyncio.run(served(answers, act))
    return found


def first_job() -> PhaseJob:
    run = a_run(asked=False)
    [job] = [a.job for a in decide(run, Observed(), START).actions if isinstance(a, Apply)]
    return job


HOOK = 'admission webhook "jobs.example" denied the request: jobs need a cost centre'
POLICY = (
    'pytorchjobs.kubeflow.org "test-sft-1" is forbidden: '
    "ValidatingAdmissionPolicy 'costs' with binding 'costs' denied request: jobs need a cost centre"
)
CAUSES = {"details": {"causes": [{"message": "ValidatingAdmissionPolicy 'costs' … denied request"}]}}


@pytest.mark.parametrize("code", [400, 403, 404, 409, 422, 429, 500])
def test_what_a_webhook_denies_waits_whatever_its_code(code: int):
    found, raised = refused(code, HOOK, "AlreadyExists" if code == 409 else "")
    assert (found.barred, found.jobs, raised) == ({SFT: HOOK}, (), None)


@pytest.mark.parametrize("code", [409, 422])
def test_so_does_a_run_whose_network_policy_is_denied(code: int):
    found, raised = refused(code, HOOK, settings=WALLED)
    assert (found.barred, found.jobs, raised) == ({SFT: HOOK}, (), None)


@pytest.mark.parametrize("code", [400, 413, 422])
def test_so_does_one_whose_network_policy_is_refused(code: int):
    """It is the operator's setting that is wrong and not the run's: no attempt fails for it."""
    found, raised = refused(code, "json: cannot unmarshal string", "BadRequest", settings=WALLED)
    why = "the API server refused its NetworkPolicy: json: cannot unmarshal string"
    assert (found.barred, found.jobs, raised) == ({SFT: why}, (), None)


@pytest.mark.parametrize(("code", "reason"), [(422, "Invalid"), (403, "Forbidden"), (401, "Unauthorized")])
def test_what_a_policy_denies_waits_whatever_its_reason(code: int, reason: str):
    found, raised = refused(code, POLICY, reason, **CAUSES)
    assert (found.barred, found.jobs, raised) == ({SFT: POLICY}, (), None)


def test_it_is_told_without_what_terminals_obey_and_shortened():
    found, _ = refused(422, 'admission webhook "x" denied the request: no\x1b[2J cost\u202e ' + "centre" * 1000)
    assert found.barred[SFT].startswith('admission webhook "x" denied the request: no cost centre')
    assert len(found.barred[SFT]) == 1024


def test_a_webhook_that_is_down_is_told_and_asked_again_soon():
    why = 'Internal error occurred: failed calling webhook "jobs.example": connection refused'
    found, raised = refused(500, why, "InternalError")
    assert found.barred == {SFT: why} and raised is not None and raised.status == 500


@pytest.mark.parametrize(
    "message",
    [
        'PyTorchJob.kubeflow.org "test-sft-1" is invalid: spec.x: Invalid value: "a": no',
        # Somebody's words within what is invalid are no denial.
        f"PyTorchJob.kubeflow.org \"test-sft-1\" is invalid: spec.x: Invalid value: '{HOOK}': no",
    ],
)
def test_an_object_that_is_invalid_fails(message: str):
    causes = {"details": {"causes": [{"reason": "FieldValueInvalid", "field": "spec.x", "message": "no"}]}}
    found, raised = refused(422, message, "Invalid", **causes)
    [job] = found.jobs
    assert (job.failure, found.barred, raised) == (FailureClass.BAD_INPUT, {}, None)
    assert message in job.message


def test_there_is_one_of_this_name():
    found, raised = refused(409, 'pytorchjobs.kubeflow.org "test-sft-1" already exists', "AlreadyExists")
    assert (found.barred, found.jobs, raised) == ({}, (), None)


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        (409, 'Operation cannot be fulfilled on resourcequotas "all": the object has been modified', "Conflict"),
        (404, "the server could not find the requested resource", "NotFound"),
        (429, "too many requests, please try again later", "TooManyRequests"),
        (500, "etcdserver: request timed out", ""),
    ],
)
def test_a_server_in_trouble_is_asked_again(code: int, message: str, reason: str):
    found, raised = refused(code, message, reason)
    assert (found.barred, found.jobs) == ({}, ()) and raised is not None and raised.status == code


# ---------------------------------------------------------------- Kueue


def test_workloads_are_read_by_the_version_that_is_served():
    asked: list[str] = []
    there = {"v1beta1"}

    def answers(request: web.Request) -> tuple[int, Object]:
        version = request.path.removeprefix(f"{KUEUE}/").split("/")[0]
        asked.append(version)
        return (200, {"items": [{"of": version}]}) if version in there else NOT_FOUND

    async def act(api: Api) -> list[Any]:
        found: list[Any] = []
        for served_now in ({"v1beta1"}, {"v1beta1"}, {"v1beta2"}, {"v1beta1", "v1beta2"}, set[str]()):
            there.clear()
            there.update(served_now)
            found.append(await api.list_workloads("default", {}))
        return found

    old, new = [{"of": "v1beta1"}], [{"of": "v1beta2"}]
    assert asyncio.run(served(answers, act)) == [old, old, new, new, None]
    assert asked == [f"v1beta{n}" for n in (2, 1, 1, 1, 2, 2, 2, 1)]


def test_of_the_warnings_about_a_pod_no_more_are_read_than_there_ever_are():
    """Anybody may write them, of a megabyte each: all of ten thousand were read, page by page."""
    asked: list[dict[str, str]] = []

    def answers(request: web.Request) -> tuple[int, Object]:
        asked.append(dict(request.query))
        return 200, {"metadata": {"continue": "more"}, "items": [{"reason": "R"}] * int(request.query["limit"])}

    found = asyncio.run(served(answers, lambda api: api.list_warnings("default", "u")))
    assert len(found) == 20
    assert asked == [{"fieldSelector": "involvedObject.uid=u,type=Warning", "limit": "20"}]
