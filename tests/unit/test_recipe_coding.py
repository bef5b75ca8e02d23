"""The coding recipe without training anything: tasks, judge, tools, reward, chat format, hub rows."""

import asyncio
import json
import random
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.tools.tool_registry import initialize_tools_from_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.coding import chat, hub, judge, prepare, reward, tasks
from recipes.tiny import chat as tiny_chat

TOOLS = {tool.name: tool for tool in initialize_tools_from_config(str(Path(chat.__file__).with_name("tools.yaml")))}
TASKS = st.builds(lambda k, seed: tasks.draw_task(k, random.Random(seed)), st.integers(1, tasks.MAX_DIFFICULTY), st.integers(0, 2**32))
JUDGE = judge.Judge()
LEVELS = ("bubblewrap", "process")
ECHO = [{"input": "1 2\n", "output": "3"}, {"input": "5 6", "output": "11\n"}]
ADD = "a,b=map(int,input().split())\nprint(a+b)"


@settings(deadline=None)
@given(TASKS, st.text())
def test_hidden_and_shown_tests_check_the_same_rules_on_other_numbers(task, seed):
    shown, hidden = tasks.tests(task, seed)
    assert [test["note"] for test in shown] == [f"Add {rule.entry()}" for rule in task] and len(hidden) == tasks.HIDDEN_PER_RULE * len(task)
    assert not {test["input"] for test in shown} & {test["input"] for test in hidden}
    for test in shown + hidden:
        rule = max((rule for rule in task if rule.start <= int(test["input"])), key=lambda rule: rule.start)
        assert test["output"] == str(rule.apply(int(test["input"])))


def test_tasks_are_distinct_keep_their_tail_and_run_out_with_an_error():
    drawn = tasks.draw_tasks(300, random.Random(0))
    lengths = [len(task) for task in drawn]
    assert len(set(drawn)) == 300 and 1.0 < sum(lengths) / 300 < 4 and max(lengths) == tasks.MAX_DIFFICULTY
    assert drawn == tasks.draw_tasks(300, random.Random(0)) and not set(drawn) & set(tasks.draw_tasks(100, random.Random(0), exclude=drawn))
    with pytest.raises(ValueError, match="ask for fewer rows"):
        tasks.draw_tasks(2000, random.Random(0))


@pytest.mark.parametrize("difficulty", [1, 3, tasks.MAX_DIFFICULTY])
def test_the_reference_programs_do_what_the_chat_says_they_do(difficulty):
    """chat.py writes conversations without running anything; the judge, which runs them, must say the same."""
    task = tasks.draw_task(difficulty, random.Random(difficulty))
    shown, hidden = tasks.tests(task, "x")
    for known in range(1, difficulty + 1):
        assert JUDGE.judge(tasks.program(task, known), shown) == chat.verdict_of(task, known, shown)
    assert JUDGE.judge(tasks.program(task, difficulty), hidden).passed == len(hidden)


VERDICTS = {
    ADD: (2, ""),
    "print(3)": (1, "Input 5 6: expected 11, got 3."),
    "print(": (0, "SyntaxError"),
    "x=1\nraise ValueError('no')": (0, "ValueError: no (line 2)"),
    "import sys\n" + ADD + "\nsys.exit(0)": (2, ""),
    ADD + "\nexit()": (2, ""),
    ADD + "\nimport sys\nsys.exit(3)": (0, "exit code 3"),
    "import os\nos.kill(os.getpid(),11)": (0, "ended by signal 11"),
    "if __name__ == '__main__':\n " + ADD.replace("\n", "\n "): (2, ""),
    "import sys\nprint(sum(map(int,sys.stdin.buffer.read().split())))": (2, ""),
    "while True: pass": (0, "time limit exceeded"),
    "import os\nif os.fork()==0:\n import time\n time.sleep(60)\n" + ADD: (2, ""),
    "import os\nos.write(1,b'x'*10**6)": (0, "expected 3, got xxx"),
    "import os,signal\nos.kill(os.getppid(),9)": (0, "killed by signal 9"),
    "import glob, os\nprint(open(sorted(glob.glob(os.getcwd() + '/*'))[0]).read())": (0, "expected 3, got"),
    "x" * 60_000: (0, "the program is longer than 50000 characters"),
    "": (0, "got ."),
}


@pytest.fixture(scope="module", params=LEVELS)
def level_judge(request):
    """A judge at each level of the sandbox; a level that does not work here fails its tests, it is not left out."""
    return judge.Judge(request.param)


@pytest.mark.parametrize("code", VERDICTS, ids=range(len(VERDICTS)))
def test_the_judge(level_judge, code, monkeypatch):
    if "while True" in code:
        monkeypatch.setattr(judge, "TEST_S", 1.0)  # else each of the tests takes four
    verdict = level_judge.judge(code, ECHO)
    assert verdict.passed == VERDICTS[code][0] and verdict.total == 2 and VERDICTS[code][1] in verdict.why and verdict.judged
    assert bool(verdict.why) == (verdict.passed < 2)


@pytest.mark.parametrize("text", ["é 𝄞 \u2028 \\ ' \" \t \0 \x7f", "\ud83d\ude00", "'''"])
def test_any_text_reaches_the_program_and_comes_back(text):
    """Code, input and output pass through literals that the judge and its harness write by hand."""
    code = f"import sys\nsys.stdout.buffer.write({text!r}.encode('utf-8', 'surrogatepass'))\nprint(input())"
    given = text.encode("utf-8", "replace").decode()
    sent = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    verdict = JUDGE.judge(code, [{"input": given, "output": sent + given}])
    assert verdict == judge.Verdict(1, 1, "")
    assert f"got {sent.strip()}" in JUDGE.judge(code, [{"input": given, "output": "other"}]).why


def test_outputs_are_compared_as_contests_do():
    assert judge.same("1 2 \n3\n\n", "1 2\n3") and judge.same("", "\n") and not judge.same("1 2", "1  2") and not judge.same("12", "1\n2")


def test_a_broken_sandbox_is_not_the_policys_fault(caplog):
    away = judge.Judge("http://127.0.0.1:1/run_code")
    assert not away.judge(ADD, ECHO).judged
    reward.JUDGE, ours = away, reward.JUDGE
    try:
        assert asyncio.run(reward.compute_score("x", f"```python\n{ADD}\n```", json.dumps(ECHO))) == 0.0
    finally:
        reward.JUDGE = ours
    assert "could not be judged" in caplog.text


async def play(name, arguments, tests=ECHO):
    tool = TOOLS[name]
    instance, _ = await tool.create(create_kwargs={"tests": json.dumps(tests)})
    try:
        return (await tool.execute(instance, arguments))[0].text
    finally:
        await tool.release(instance)


async def test_the_tools_answer_whatever_they_are_sent():
    assert await play("test", {"code": ADD}) == "All tests passed."
    assert await play("test", {"code": "print(3)"}) == "1 of 2 passed. Input 5 6: expected 11, got 3."
    assert await play("run", {"code": ADD, "stdin": "4 5"}) == "9" and await play("run", {"code": ""}) == "(no output)"
    assert await play("run", {"code": "print(1)\n1/0"}) == "1\nZeroDivisionError: division by zero"
    for wrong in ({}, {"code": 3}, {"code": None}, []):
        assert (await play("test", wrong)).startswith("error:") and (await play("run", wrong)).startswith("error:")
    assert not TOOLS["test"]._tests, "released"


CALL = '<tool_call>{{"name": "test", "arguments": {{"code": {}}}}}</tool_call>'
LAST = {
    CALL.format('"a"') + "<tool_response>x</tool_response>" + CALL.format('"b"'): "b",
    CALL.format('"a"') + "<tool_response>x</tool_response>Done.": "a",
    CALL.format('"a"') + "<tool_response>x</tool_response>```python\nc\n```": "c\n",
    "```python\nold\n```" + CALL.format('"a"') + "<tool_response>x</tool_response>": "a",
    CALL.format('"a"') + CALL.format("broken"): "a",
    "no program": None,
    CALL.format("3"): None,
}


@pytest.mark.parametrize("text", LAST)
def test_the_last_program_counts(text):
    assert reward.last_program(text) == LAST[text]


async def test_the_reward_is_the_share_of_hidden_tests():
    row = tasks.to_row(tasks.draw_task(4, random.Random(1)), 0, "train")
    task = tasks.draw_task(4, random.Random(1))
    values = []
    for known in (1, 2, 3, 4):
        text = CALL.format(json.dumps(tasks.program(task, known)))
        values.append(await reward.compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"]))
    assert values == sorted(values) and values[0] < values[2] < 1 and values[3] == pytest.approx(reward.SOLVED)
    memorised = "d=" + repr(
        {t["input"]: t["output"] for t in json.loads(row["extra_info"]["tools_kwargs"]["test"]["create_kwargs"]["tests"])}
    )
    cheat = CALL.format(json.dumps(memorised + "\nprint(d.get(input()))"))
    assert await reward.compute_score("x", cheat, row["reward_model"]["ground_truth"]) == 0.0, "repeating the shown tests earns nothing"
    assert await reward.compute_score("x", "nothing", row["reward_model"]["ground_truth"]) == 0.0


def test_training_sees_calls_as_the_model_says_them():
    tokenizer = tiny_chat.make_tokenizer(chat.lesson())
    task = tasks.draw_task(tasks.MAX_DIFFICULTY, random.Random(2))
    ids, labels = tiny_chat.encode(tokenizer, chat.tool_schemas(), chat.conversation(task))
    spoken = tokenizer.decode([label for label in labels if label >= 0])
    assert spoken.count("<tool_call>") == tasks.MAX_DIFFICULTY and spoken.endswith("Done.<|im_end|>") and len(ids) < 1024
    assert json.loads(spoken.split("<tool_call>")[-1].split("</tool_call>")[0])["arguments"]["code"] == tasks.program(task, len(task))
    assert len(tokenizer) <= 512 + 8


def test_prepare_writes_rows_that_the_tool_and_the_reward_can_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare.main(["--out", str(tmp_path), "--train-rows", "40", "--val-rows", "8"])
    rows = {split: pq.read_table(tmp_path / f"{split}.parquet").to_pylist() for split in ("train", "val")}
    assert {split: len(some) for split, some in rows.items()} == {"train": 40, "val": 8}
    for row in rows["train"]:
        shown, hidden = (
            json.loads(row["extra_info"]["tools_kwargs"]["test"]["create_kwargs"]["tests"]),
            json.loads(row["reward_model"]["ground_truth"]),
        )
        assert len(hidden) == 2 * len(shown) == 2 * row["extra_info"]["difficulty"]
    prepare.main(["--out", str(tmp_path), "--train-rows", "40", "--max-difficulty", "3"])
    assert {row["extra_info"]["difficulty"] for row in pq.read_table(tmp_path / "train.parquet").to_pylist()} == {1, 2, 3}
    for wrong, said in ((["--data", "apps"], "apps"), (["--max-difficulty", "9"], "at most 8"), (["--max-difficulty", "0"], "positive")):
        with pytest.raises(SystemExit):
            prepare.main(["--out", str(tmp_path), *wrong])
        assert said in capsys.readouterr().err


def test_rows_of_the_hub_are_converted():
    tests = {"inputs": ["1\n", "2\n", "3\n"], "outputs": ["1\n", "4\n", "9\n"]}
    row = hub.from_apps({"question": "Square it.", "input_output": json.dumps(tests)}, 0)
    assert (
        len(json.loads(row["extra_info"]["tools_kwargs"]["test"]["create_kwargs"]["tests"])) == 1
        and len(json.loads(row["reward_model"]["ground_truth"])) == 2
    )
    assert hub.from_apps({"question": "f", "input_output": json.dumps(tests | {"fn_name": "f"})}, 0) is None
    assert (
        hub.from_apps({"question": "f", "input_output": ""}, 0) is None and hub.from_apps({"question": "f", "input_output": "{"}, 0) is None
    )
    contest = {"description": "Square it."} | {
        name: {"input": ["1"], "output": ["1"]} for name in ("public_tests", "private_tests", "generated_tests")
    }
    assert len(json.loads(hub.from_code_contests(contest, 0)["reward_model"]["ground_truth"])) == 2
    assert hub.from_code_contests(contest | {"public_tests": {"input": [], "output": []}}, 0) is None
