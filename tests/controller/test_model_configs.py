"""Configs of models in the operator: they come when they come."""

import asyncio
import threading

from builders import DATA, make_run

from controller.operator.model_configs import RETRY_SECONDS, ModelConfigs

CONFIG = {"model_type": "llama"}
KEY = ("ns", "run")
SOURCE = ("org/name", None)


def run_of(source: str = "org/name"):
    return make_run({"name": "sft", "sft": {"model": {"source": source}, "data": DATA}})


def test_nothing_waits_and_the_run_is_looked_at_again():
    release, again = threading.Event(), []

    def slow(wanted, _):
        release.wait(5)
        return dict.fromkeys(wanted, CONFIG)

    async def scenario():
        configs = ModelConfigs(again.append, slow)
        assert configs.of(KEY, run_of()) == {}
        assert configs.of(KEY, run_of()) == {}, "asked for once"
        release.set()
        while not again:
            await asyncio.sleep(0.01)
        assert configs.of(KEY, run_of()) == {SOURCE: CONFIG}

    asyncio.run(scenario())
    assert again == [KEY]


def test_what_cannot_be_had_is_asked_for_again_much_later():
    asked, now = [], [0.0]

    async def scenario():
        configs = ModelConfigs(lambda _: None, lambda wanted, _: asked.append(wanted) or {}, lambda: now[0])
        for moment in (0.0, 1.0, RETRY_SECONDS + 1):
            now[0] = moment
            assert configs.of(KEY, run_of()) == {}
            await asyncio.sleep(0.05)
        await configs.close()

    asyncio.run(scenario())
    assert asked == [{SOURCE}, {SOURCE}]


def test_whatever_goes_wrong_the_run_goes_on(caplog):
    def broken(*_):
        raise RuntimeError("boom")

    async def scenario():
        configs = ModelConfigs(lambda _: None, broken)
        configs.of(KEY, run_of())
        await asyncio.sleep(0.05)
        assert configs.of(KEY, run_of()) == {}

    asyncio.run(scenario())
    assert "boom" in caplog.text


def test_scratch_models_are_not_asked_for():
    async def scenario():
        configs = ModelConfigs(lambda _: None, lambda *_: 1 / 0)
        run = make_run(
            {
                "name": "sft",
                "sft": {
                    "model": {"scratch": {"hiddenSize": 8, "numLayers": 1, "tokenizer": {"trainOn": DATA["train"]}}},
                    "data": DATA,
                },
            }
        )
        assert configs.of(KEY, run) == {}

    asyncio.run(scenario())
