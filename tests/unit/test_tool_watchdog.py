"""The watchdog over tools, on verl's own tool classes: whatever a tool does, a call ends in time, in a text or a plain exception."""

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from verl.tools.base_tool import BaseTool
from verl.tools.function_tool import FunctionTool, normalize_function_tool_return
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from verl_heddle.options import Tools
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import TrajectoryId
from verl_heddle.verl_plugin import tool_watchdog
from verl_heddle.verl_plugin.live import CURRENT, watch_tool
from verl_heddle.verl_plugin.tool_watchdog import ToolError, Watchdog

SCHEMA = OpenAIFunctionToolSchema.model_validate(
    {
        "type": "function",
        "function": {"name": "t", "description": "", "parameters": {"type": "object", "properties": {}, "required": []}},
    }
)
QUICK = Tools(call_s=0.15, trajectory_s=100.0, max_chars=1000)
HANGS_S = 30
"""How long a hanging tool hangs: whoever is sooner did not wait for it."""


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(tool_watchdog, "CANCEL_S", 0.1)
    monkeypatch.setattr(tool_watchdog, "BACKOFF_S", 0.01)


def function(fn, options=QUICK):
    """(guarded tool, counts) around a plain function or coroutine function."""
    counts = Counter()
    tool = FunctionTool("t", fn, SCHEMA, asyncio.iscoroutinefunction(fn))
    return watch_tool(Watchdog(options, counts).guard(tool)), {"of": counts}


def told(counts):
    return {name.removeprefix("tools/"): n for name, n in counts["of"].items() if n}


async def both_kinds(do, options=QUICK):
    """The outcome of `do` as the body of a plain and of a coroutine function: [(text or ToolError, counts), ...]."""

    def plain():
        return do()

    async def coroutine():
        return do()

    found = []
    for fn in (plain, coroutine):
        tool, counts = function(fn, options)
        try:
            found.append((normalize_function_tool_return(await tool.call({}))[0].text, told(counts)))
        except ToolError as error:
            found.append((error, told(counts)))
    return found


async def test_a_tool_that_works_is_passed_through_unchanged():
    for value in ("text", {"a": 1}, ("text", 0.5), ("text", None, {"m": 1}), 7, ToolResponse(text="x"), None):
        for text, counts in await both_kinds(lambda value=value: value):
            assert text == normalize_function_tool_return(value)[0].text and counts == {"calls": 1}
    tool, _ = function(lambda: ("text", 0.5, {"m": 1}))
    assert await tool.call({}) == (ToolResponse(text="text"), 0.5, {"m": 1})


def crash(kind):
    raise kind("on purpose \udcff")


@pytest.mark.parametrize(
    "kind", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError, type("Own", (BaseException,), {})]
)
async def test_a_crash_of_any_kind_is_an_error_for_the_model(kind):
    for error, counts in await both_kinds(lambda: crash(kind)):
        assert isinstance(error, ToolError) and str(error) == f"{kind.__name__}: on purpose ?"
        assert counts == {"calls": 1, "failures": 1, "crashes": 1}


async def test_wrong_arguments_are_a_crash():
    tool, counts = function(lambda code: code)
    for wrong in ({"other": 1}, [1], None):
        with pytest.raises(ToolError, match="TypeError"):
            await tool.call(wrong)
    assert told(counts)["crashes"] == 3


async def test_a_plain_function_that_hangs_is_left_alone_and_others_go_on():
    stop = threading.Event()
    tool, counts = function(lambda: stop.wait(HANGS_S) and "late")
    start = time.monotonic()
    errors = await asyncio.gather(*(tool.call({}) for _ in range(10)), return_exceptions=True)
    assert time.monotonic() - start < HANGS_S and {str(error) for error in errors} == {"no answer within 0.15 s"}
    assert told(counts) == {"calls": 10, "failures": 10, "timeouts": 10, "abandoned": 10}
    stop.set()
    await asyncio.sleep(0.05)
    assert normalize_function_tool_return(await tool.call({}))[0].text == "late"


async def test_a_tool_that_only_hangs_is_given_up_until_it_recovers():
    stop = threading.Event()
    tool, counts = function(lambda: stop.wait(HANGS_S) and "late", replace(QUICK, max_abandoned=2))
    for _ in range(2):
        with pytest.raises(ToolError, match="no answer"):
            await tool.call({})
    with pytest.raises(ToolError, match="2 earlier calls are still hanging"):
        await tool.call({})
    assert told(counts) == {"calls": 3, "failures": 3, "timeouts": 2, "abandoned": 2}, "the third is not waited for"
    stop.set()
    await asyncio.sleep(0.05)
    assert (await tool.call({}))[0].text == "late"


async def test_a_coroutine_that_hangs_is_cancelled_and_cleans_up():
    cleaned = []

    async def hang():
        try:
            await asyncio.sleep(HANGS_S)
        finally:
            cleaned.append(True)

    tool, counts = function(hang)
    with pytest.raises(ToolError, match=r"no answer within 0\.15 s"):
        await tool.call({})
    assert cleaned and told(counts) == {"calls": 1, "failures": 1, "timeouts": 1}


async def test_a_coroutine_that_refuses_to_be_cancelled_is_left_alone():
    stop = asyncio.Event()

    async def deaf():
        while not stop.is_set():
            try:
                await asyncio.wait_for(asyncio.shield(stop.wait()), HANGS_S)
            except asyncio.CancelledError:
                continue

    tool, counts = function(deaf)
    start = time.monotonic()
    with pytest.raises(ToolError, match="no answer"):
        await tool.call({})
    assert time.monotonic() - start < HANGS_S and told(counts)["abandoned"] == 1
    stop.set()
    await asyncio.sleep(0.02)

    async def suicidal():
        raise asyncio.CancelledError

    with pytest.raises(ToolError, match="it cancelled itself"):
        await function(suicidal)[0].call({})


@pytest.mark.parametrize("is_async", [True, False])
async def test_cancelling_the_trajectory_cancels_its_tool(is_async):
    state = []

    async def slow():
        try:
            await asyncio.sleep(HANGS_S)
        except asyncio.CancelledError:
            state.append("cancelled")
            raise

    stop = threading.Event()
    tool, _ = function(slow if is_async else (lambda: stop.wait(HANGS_S)), replace(QUICK, call_s=30))
    task = asyncio.create_task(tool.call({}))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert state == (["cancelled"] if is_async else [])
    stop.set()


async def test_a_flood_is_cut_at_both_ends():
    flood = "a" + "x" * 100_000_000 + "z"
    for text, counts in await both_kinds(lambda: flood):
        assert len(text) < 1100 and text[0] == "a" and text[-1] == "z" and "99999002 characters left out" in text
        assert counts == {"calls": 1, "cut": 1}
    for text, _ in await both_kinds(lambda: b"\xff" * 10_000_000):
        assert len(text) < 1100


async def test_text_that_is_no_unicode_is_repaired():
    for value in ("a\udcffb", ToolResponse(text="a\udcffb"), ("a\udcffb", 1.0)):
        for text, counts in await both_kinds(lambda value=value: value):
            assert text == "a?b" and counts == {"calls": 1, "repaired": 1}
    for text, _ in await both_kinds(lambda: b"a\xffb"):
        assert text == "a\ufffdb"
    tool, _ = function(lambda: {"x": "\udcff"})
    json.loads((await tool.call({}))[0].text)


async def test_only_tools_named_idempotent_are_tried_again():
    for names, retries, calls in ((["t"], 2, 3), (["t"], 0, 1), (["other"], 2, 1)):
        made = []
        tool, counts = function(lambda made=made: made.append(1) or crash(ValueError), replace(QUICK, idempotent=names, retries=retries))
        with pytest.raises(ToolError):
            await tool.call({})
        assert len(made) == calls and told(counts).get("retries", 0) == calls - 1 and told(counts)["failures"] == 1
    made = []
    tool, counts = function(lambda: made.append(1) or (crash(ValueError) if len(made) == 1 else "well"), replace(QUICK, idempotent=["t"]))
    assert (await tool.call({}))[0].text == "well" and "failures" not in told(counts)


async def test_a_trajectory_has_so_much_time_for_tools_and_no_more():
    recorder = Recorder(TrajectoryId("p", "u", 0, 1, False), 0.0, 0.0)
    CURRENT.set(recorder)
    tool, counts = function(lambda: time.sleep(0.08), replace(QUICK, call_s=10, trajectory_s=0.2))
    results = await asyncio.wait_for(asyncio.gather(*[_ordered(tool, 4)]), 5)
    assert [isinstance(result, ToolError) for result in results[0]] == [False, False, True, True]
    assert "used up" in str(results[0][3]) and told(counts)["out_of_time"] == 1 and told(counts)["timeouts"] == 1


async def _ordered(tool, count):
    found = []
    for _ in range(count):
        try:
            found.append(await tool.call({}))
        except ToolError as error:
            found.append(error)
    return found


class Stateful(BaseTool):
    """A verl tool whose life goes wrong where it is told to."""

    def __init__(self, wrong=""):
        super().__init__({}, SCHEMA)
        self.wrong = wrong

    async def _maybe(self, where):
        if self.wrong == f"hang in {where}":
            await asyncio.sleep(HANGS_S)
        if self.wrong == f"crash in {where}":
            raise SystemExit(1)

    async def create(self, instance_id=None, **kwargs):
        await self._maybe("create")
        return "1", ToolResponse()

    async def execute(self, instance_id, parameters, **kwargs):
        await self._maybe("execute")
        return ToolResponse(text="fine"), None, {}

    async def release(self, instance_id, **kwargs):
        await self._maybe("release")


@pytest.mark.parametrize("trouble", ["hang", "crash"])
@pytest.mark.parametrize("where", ["create", "execute", "release"])
async def test_stateful_tools_are_guarded_in_all_they_do(where, trouble):
    counts = Counter()
    tool = watch_tool(Watchdog(QUICK, counts).guard(Stateful(f"{trouble} in {where}")))
    start, failed = time.monotonic(), None
    for name, call in (
        ("create", lambda: tool.create(create_kwargs={})),
        ("execute", lambda: tool.execute("1", {}, agent_data=None)),
        ("release", lambda: tool.release("1")),
    ):
        try:
            result = await call()
        except ToolError:
            failed = name
            continue
        if name == "execute":
            assert result == (ToolResponse(text="fine"), None, {}), "no reward stays no reward"
    assert failed == (None if where == "release" else where), "verl does not catch what a release raises"
    assert time.monotonic() - start < HANGS_S and counts["tools/timeouts" if trouble == "hang" else "tools/crashes"] == 1


def test_off_means_absent_and_twice_means_once():
    tool = FunctionTool("t", print, SCHEMA)
    assert Watchdog(replace(QUICK, enable=False), Counter()).guard(tool).call.__func__ is FunctionTool.call
    dog = Watchdog(QUICK, Counter())
    call = dog.guard(tool).call
    assert dog.guard(tool).call is call


class WithItsOwnCall(Stateful):
    """A tool whose class happens to name a method as verl's `FunctionTool` does."""

    def call(self, text):
        return f"fine: {text}"

    async def execute(self, instance_id, parameters, **kwargs):
        return ToolResponse(text=self.call("asked")), None, {}


class Loop:
    """As much of verl's tool agent loop as its `_call_tool` reads."""

    max_tool_response_length, tool_response_truncate_side = 100, "middle"

    def __init__(self, tool):
        self.tools = {"t": tool}


async def verl_calls(tool):
    from verl.experimental.agent_loop.tool_agent_loop import FunctionCall, ToolAgentLoop

    response, _, _ = await ToolAgentLoop._call_tool(Loop(tool), FunctionCall(name="t", arguments="{}"), {}, None)
    return response.text


@pytest.mark.parametrize("enable", [True, False])
async def test_only_what_verl_awaits_is_wrapped(enable):
    recorder = Recorder(TrajectoryId("p", "u", 0, 1), 0.0, 0.0)
    CURRENT.set(recorder)
    tool = watch_tool(Watchdog(replace(QUICK, enable=enable), Counter()).guard(WithItsOwnCall()))
    assert await verl_calls(tool) == "fine: asked" and tool.call("me") == "fine: me"
    assert [name for name, _, _ in recorder._tools] == ["t"], "timed once"
    plain = watch_tool(Watchdog(replace(QUICK, enable=enable), Counter()).guard(FunctionTool("t", lambda: "fine", SCHEMA)))
    assert await verl_calls(plain) == "fine" and len(recorder._tools) == 2


async def test_the_stop_watch_never_breaks_a_call(monkeypatch, capsys):
    def broken(*args):
        raise OSError("no router")

    monkeypatch.setattr(Recorder, "tool_ran", broken)
    CURRENT.set(Recorder(TrajectoryId("p", "u", 0, 1), 0.0, 0.0, listener=broken))
    assert await verl_calls(watch_tool(Stateful())) == "fine"
    assert capsys.readouterr().err.count("could not be recorded") == 1

    class Fixed(Stateful):
        def __setattr__(self, name, value):
            if name == "execute":
                raise AttributeError("read only")
            super().__setattr__(name, value)

    assert await verl_calls(watch_tool(Fixed())) == "fine"
