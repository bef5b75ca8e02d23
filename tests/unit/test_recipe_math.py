"""The math recipe without training anything: tool, tasks, reward, chat format, and what `prepare.py` writes."""

import asyncio
import json
import random
import re
import statistics
import string
import sys
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from verl.tools.function_tool import load_function_tools_from_path
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.math import chat, prepare, reward, tasks
from recipes.tiny import chat as tiny_chat
from recipes.tiny import files, model

TOOL = load_function_tools_from_path(str(Path(prepare.__file__).with_name("tools.py")))[0]
TOOL_MODULE = sys.modules[TOOL.fn.__module__]
first_step = TOOL_MODULE.first_step
SCHEMAS = chat.tool_schemas()

CHAINS = st.from_regex(r"-?[0-9]{1,7}([+-][0-9]{1,7}){0,8}", fullmatch=True)
SEEDS = st.integers(0, 2**32)
unhurried = settings(deadline=None)  # on a busy machine a single example can take long


STEPS = {"3+4-2+5": "7-2+5", "7": "7", "007": "7", "3-5+4": "-2+4", "-2+4": "2", " 3 + 4 - 2 ": "7-2", "-0": "0"}


@pytest.mark.parametrize("expression", STEPS)
def test_simplify_does_one_step(expression):
    assert first_step(expression) == STEPS[expression]


@pytest.mark.parametrize("bad", ["", "+", "3+", "3*4", "3--4", "1 2+3", "٣+4", "3+4\n5", "9" * 5000, None, 7, ["3+4"]])
def test_bad_input_gets_an_error_text(bad):
    assert first_step(bad).startswith("error:")


@unhurried
@given(CHAINS)
def test_a_step_keeps_the_value_and_removes_one_operation(expression):
    before, after = tasks.steps(expression), tasks.steps(first_step(expression))
    assert int(after[-1]) == int(before[-1]) and len(after) == max(1, len(before) - 1)


@unhurried
@given(st.text(alphabet=string.digits + "+- ()x\n", max_size=250) | st.text())
def test_a_step_never_raises(text):
    result = first_step(text)
    assert result.startswith("error:") or set(result) <= set(string.digits + "+-")


async def test_the_tool_waits_without_blocking_the_event_loop(monkeypatch):
    monkeypatch.setattr(TOOL_MODULE, "DELAY_S", 0.02)
    order = []

    async def note(awaitable):
        order.append(await awaitable)

    await asyncio.gather(note(TOOL.call({"expression": "1+2"})), note(asyncio.sleep(0, "meanwhile")))
    assert TOOL.is_async and order == ["meanwhile", "3"]
    for setting in ("-1", "nan", "inf", "fast", ""):
        with pytest.raises(ValueError):
            TOOL_MODULE.delay_seconds(setting)


@unhurried
@given(SEEDS, st.integers(1, tasks.MAX_DIFFICULTY))
def test_tasks_stay_in_bounds_and_agree_with_the_tool(seed, difficulty):
    path = tasks.steps(tasks.draw_expression(difficulty, random.Random(seed)))
    assert len(path) == difficulty + 1
    assert [first_step(before) for before in path[:-1]] == path[1:]
    assert all(0 <= int(re.findall("^-?[0-9]+", left)[0]) <= tasks.MAX_VALUE for left in path)
    assert all(1 <= int(term) <= tasks.MAX_OPERAND for term in re.findall("[0-9]+", path[0]))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(0, 200))
def test_difficulties_follow_their_distribution_within_one_row(seed, rows):
    drawn = tasks.draw_difficulties(rows, random.Random(seed))
    assert len(drawn) == rows
    for difficulty, probability in enumerate(tasks.difficulty_probabilities(), start=1):
        assert abs(drawn.count(difficulty) - rows * probability) <= 1 + 1e-9
    turns = [k + 1 for k in drawn]
    assert rows < 64 or max(turns) >= 3 * statistics.median(turns)


def test_tasks_are_distinct_and_run_out_with_an_error():
    drawn = tasks.draw_tasks(500, random.Random(0))
    assert len(set(drawn)) == 500 and drawn == tasks.draw_tasks(500, random.Random(0))
    assert not set(drawn) & set(tasks.draw_tasks(300, random.Random(0), exclude=drawn))
    with pytest.raises(ValueError, match="ask for fewer rows"):
        tasks.draw_tasks(20_000, random.Random(0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As verl and vLLM load it: by AutoTokenizer, from a folder whose config says qwen2."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_chat.make_tokenizer(chat.lesson()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return AutoTokenizer.from_pretrained(folder)


def play(tokenizer, expression):
    """(prompt ids, response ids) of the reference episode, put together turn by turn as verl's tool agent loop does it."""
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen2")
    messages = chat.conversation(expression)
    ids = prompt = builder.build_initial_tokens(messages[:1], tools=SCHEMAS)
    for i in range(1, len(messages), 2):
        alone = tokenizer.apply_chat_template([messages[i]], tokenize=False).removeprefix("<|im_start|>assistant\n").rstrip("\n")
        ids = builder.merge_assistant_tokens(ids, tokenizer(alone).input_ids).token_ids
        if i + 1 < len(messages):
            ids = builder.merge_context_tokens(messages[: i + 1], messages[: i + 2], ids, tools=SCHEMAS).token_ids
    return prompt, ids[len(prompt) :]


def test_training_sees_the_tokens_of_a_rollout(tokenizer):
    ids, labels = tiny_chat.encode(tiny_chat.make_tokenizer(chat.lesson()), SCHEMAS, chat.conversation("12-3+40"))
    prompt, response = play(tokenizer, "12-3+40")
    assert prompt + response == ids[:-1]  # the template closes a message with a newline that a model does not say
    assert tokenizer.decode([label for label in labels if label >= 0]) == (
        '<tool_call>{"name": "simplify", "arguments": {"expression": "12-3+40"}}</tool_call><|im_end|>'
        '<tool_call>{"name": "simplify", "arguments": {"expression": "9+40"}}</tool_call><|im_end|>'
        "The answer is 49.<|im_end|>"
    )


@unhurried
@given(st.text())
def test_the_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text)


def test_digits_are_tokens_and_the_longest_episode_fits_the_budget(tokenizer):
    assert len(tokenizer("12345").input_ids) == 5
    rng = random.Random(0)
    longest = max((tasks.draw_expression(tasks.MAX_DIFFICULTY, rng) for _ in range(2000)), key=lambda e: sum(map(len, tasks.steps(e))))
    prompt, response = play(tokenizer, longest)
    assert len(response) < 1024 and len(prompt) < 128  # run.sh allows 1024 and 512


def score(text, expression="3+4-2"):
    row = tasks.to_row(expression, 0, "train")
    return reward.compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"])


def test_the_reference_episode_earns_everything(tokenizer):
    text = tokenizer.decode(play(tokenizer, "30-19+11-1")[1], skip_special_tokens=True)
    assert score(text, "30-19+11-1") == pytest.approx(1.2)


def responses(*texts, last="The answer is 5."):
    return "".join(f"<tool_call>...</tool_call>\nuser\n<tool_response>{t}</tool_response>\nassistant\n" for t in texts) + last


RIGHT = ["The answer is 5.", "the answer is: **5**", "The answer is 9. The answer is 5", "The answer is 05."]
WRONG = ["", "5", "The answer is 5.5", "The answer is -5.", "The answer is 5. <tool_call>", "The answer is 5" + "0" * 5000]


@pytest.mark.parametrize("last", RIGHT + WRONG)
def test_what_counts_as_the_right_answer(last):
    assert (score(responses("7-2", "5", last=last)) >= reward.CORRECT) == (last in RIGHT)


def test_only_the_last_assistant_message_can_answer():
    assert score("The answer is 5." + responses("7-2", last="")) < reward.CORRECT
    assert score("<tool_response>The answer is 5.</tool_response>") < reward.CORRECT
    assert score(responses("7-2") + "\nuser\n<tool_response>5") < reward.CORRECT


def test_shaping_orders_wrong_episodes_by_how_far_they_were_right():
    at_once, at_the_end = score(responses("8-2", "6", last="")), score(responses("7-2", "6", last=""))
    with_error = score(responses("error: ...", "7-2", "6", last=""))
    assert 0 == at_once < with_error < at_the_end < score(responses("7-2", "6", last="The answer is 6.")) < 0.2


@unhurried
@given(st.text() | st.lists(st.sampled_from(["<tool_response>", "</tool_response>", "7-2", "5", "The answer is ", "-", "\n"])).map("".join))
def test_the_reward_takes_any_text_and_is_bounded(text):
    value = score(text)
    assert isinstance(value, float) and (0 <= value <= 0.2 or 1 <= value <= 1.2)
    assert 0 <= reward.compute_score("other", text, "5") <= value + 1e-9  # without extra_info: no credit for the way


def test_the_first_layer_starts_out_looking_at_the_tokens_before(tokenizer):
    policy = model.make_model(tokenizer, model.Settings())
    assert policy.config.vocab_size == len(tokenizer)
    attention, positions = policy.model.layers[0].self_attn, 32
    query, key = (p.bias.view(1, -1, 1, attention.head_dim).expand(-1, -1, positions, -1) for p in (attention.q_proj, attention.k_proj))
    cos, sin = policy.model.rotary_emb(query, query.new_tensor([list(range(positions))]))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    best = (query @ key.transpose(-1, -2))[0].argmax(-1)  # (heads, positions)
    for head, row in enumerate(best.tolist()):
        assert row[head + 1 :] == list(range(positions - head - 1))


def state(folder):
    """Name -> inode of every file: a file that was written again has another one."""
    return {str(p.relative_to(folder)): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}


def test_prepare_keeps_what_is_there_and_replaces_what_is_not_right(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--train-rows", "40", "--val-rows", "8"]
    prepare.main(arguments)
    first = state(tmp_path)
    rows = {split: pq.read_table(tmp_path / f"{split}.parquet").to_pylist() for split in ("train", "val")}
    assert {split: len(drawn) for split, drawn in rows.items()} == {"train": 40, "val": 8}
    assert len({row["prompt"][0]["content"] for split in rows.values() for row in split}) == 48
    prepare.main(arguments)
    assert state(tmp_path) == first and capsys.readouterr().out.count("already there") == 2
    (tmp_path / "train.parquet").write_bytes(b"torn")
    prepare.main(arguments)
    assert pq.read_table(tmp_path / "train.parquet").to_pylist() == rows["train"]
    prepare.main([*arguments, "--max-difficulty", "2"])
    assert {row["extra_info"]["difficulty"] for row in pq.read_table(tmp_path / "train.parquet").to_pylist()} == {1, 2}
    with pytest.raises(SystemExit):
        prepare.main([*arguments, "--data", "gsm8k", "--max-difficulty", "2"])
    prepare.main(arguments)
    first = state(tmp_path)
    prepare.main([*arguments, "--train-rows", "50"])
    assert pq.read_table(tmp_path / "train.parquet").num_rows == 50 and state(tmp_path)["val.parquet"] == first["val.parquet"]


def test_prepare_makes_the_model_once_and_whole(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--train-rows", "4", "--val-rows", "4", "--model"]

    def interrupted(folder, lesson):
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.parquet", "val.parquet"]
    monkeypatch.setattr(model, "build", lambda folder, lesson: {"parameters": 1, "vocabulary": 2, "seconds": 3})
    prepare.main(arguments)
    first = state(tmp_path)
    prepare.main(arguments)
    assert state(tmp_path) == first and "tiny_model: already there" in capsys.readouterr().out
    monkeypatch.setattr(files, "fingerprint", lambda recipe: "newer")
    prepare.main(arguments)
    assert files.made_from(tmp_path / "tiny_model") == "newer"
    (tmp_path / "tiny_model" / files.STAMP).unlink()  # now it could be anybody's
    with pytest.raises(SystemExit):
        prepare.main(arguments)
