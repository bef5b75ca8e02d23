"""Play tasks with a tiny policy, without verl's trainer or an inference engine.

Prompts, tool calls, multi-turn tokenization and reward are the ones of a verl run: verl's tool parser and chat builder, the recipe's tools
and reward. Episodes advance in lockstep, one batched generation per turn.
"""

import argparse
import asyncio
import inspect
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import FunctionTool
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from recipes.tiny.chat import Message

MAX_TURN_TOKENS = 192  # longer than a regular call; verl lets a message that does not end run on to the end of the episode's budget


@dataclass
class Episode:
    """One row of data being played: `ids` is the whole token stream, prompt included."""

    row: dict[str, Any]
    messages: list[Message]
    ids: list[int]
    prompt_tokens: int
    turns: int = 0
    over: bool = False
    score: float = 0.0

    @property
    def response_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens


class Player:
    """Plays batches of episodes with one model; `temperature` 0 is greedy. Sampling uses the global torch seed."""

    def __init__(self, folder: str, tools: Sequence[Any], score: Callable[..., Any], response_length: int, max_turns: int) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tools, self.score = {tool.name: tool for tool in tools}, score
        self.schemas = [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]
        self.parser = ToolParser.get_tool_parser("hermes", self.tokenizer)
        self.builder = create_continuous_token_builder(self.tokenizer, hf_model_type="qwen2")
        self.response_length, self.max_turns = response_length, max_turns

    def play(self, rows: Sequence[dict[str, Any]], temperature: float) -> list[Episode]:
        """One finished, scored episode per row."""
        return asyncio.run(self._play(rows, temperature))  # one event loop for all: tools may keep threads and locks of it

    async def _play(self, rows: Sequence[dict[str, Any]], temperature: float) -> list[Episode]:
        episodes = []
        for row in rows:
            ids = self.builder.build_initial_tokens(row["prompt"], tools=self.schemas)
            episodes.append(Episode(row, list(row["prompt"]), ids, prompt_tokens=len(ids)))
        while active := [e for e in episodes if not e.over]:
            said = self._generate(active, temperature)
            await asyncio.gather(*(self._advance(episode, new_ids) for episode, new_ids in zip(active, said, strict=True)))
        for episode in episodes:
            text = str(self.tokenizer.decode(episode.ids[episode.prompt_tokens :][: self.response_length], skip_special_tokens=True))
            row = episode.row
            score = self.score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"])
            episode.score = await score if inspect.isawaitable(score) else score
        return episodes

    @torch.no_grad()
    def _generate(self, episodes: list[Episode], temperature: float) -> list[list[int]]:
        """The next assistant message of each episode, its end token included."""
        width = max(len(e.ids) for e in episodes)
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        prompts = torch.tensor([[pad] * (width - len(e.ids)) + e.ids for e in episodes])  # (episodes, width), padded on the left
        mask = torch.tensor([[0] * (width - len(e.ids)) + [1] * len(e.ids) for e in episodes])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        output = self.model.generate(prompts, attention_mask=mask, max_new_tokens=MAX_TURN_TOKENS, **sampling)[:, width:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in output]

    async def _advance(self, episode: Episode, new_ids: list[int]) -> None:
        """Append an assistant message and the tool responses it asked for; the same stopping rules as verl's tool agent loop."""
        episode.ids = self.builder.merge_assistant_tokens(episode.ids, new_ids).token_ids
        episode.turns += 1
        content, calls = await self.parser.extract_tool_calls(new_ids)
        if not calls or episode.turns >= self.max_turns or episode.response_tokens >= self.response_length:
            episode.over = True
            return
        before = [*episode.messages, {"role": "assistant", "content": content}]
        responses = [{"role": "tool", "content": await self._call(calls[0], episode.row)}]  # verl, too, runs one call per turn by default
        merged = self.builder.merge_context_tokens(before, before + responses, episode.ids, tools=self.schemas)
        episode.messages, episode.ids = before + responses, merged.token_ids
        episode.over = episode.response_tokens >= self.response_length

    async def _call(self, call: FunctionCall, row: dict[str, Any]) -> str:
        try:
            tool, arguments = self.tools[call.name], json.loads(call.arguments)
            if isinstance(tool, FunctionTool):
                return await tool.call(arguments)
            given = row["extra_info"].get("tools_kwargs", {}).get(call.name, {}).get("create_kwargs", {})
            instance, _ = await tool.create(create_kwargs=given)
            try:
                return (await tool.execute(instance, arguments))[0].text or ""
            finally:
                await tool.release(instance)
        except Exception as error:  # a policy can send anything; verl answers with a text as well
            return f"Error executing tool '{call.name}': {error}"


def report(title: str, episodes: Sequence[Episode], right_at: float) -> None:
    """Print one line per difficulty, and one for all tasks. "right" is the share of episodes with a score of at least `right_at`."""
    print(f"\n{title}\ndifficulty  right  reward  turns p50/max  response tokens p50/max")
    for difficulty in sorted({e.row["extra_info"]["difficulty"] for e in episodes}):
        group = [e for e in episodes if e.row["extra_info"]["difficulty"] == difficulty]
        turns, tokens = [e.turns for e in group], [e.response_tokens for e in group]
        print(
            f"{difficulty:10d}  {statistics.mean(e.score >= right_at for e in group):5.2f}  {statistics.mean(e.score for e in group):6.2f}"
            f"  {statistics.median(turns):7.0f}/{max(turns):<5d}  {statistics.median(tokens):15.0f}/{max(tokens)}"
        )
    print(f"  all tasks  {statistics.mean(e.score >= right_at for e in episodes):.2f}")


def evaluate(
    doc: str,
    default_model: str,
    tools: Callable[[], Sequence[Any]],
    score: Callable[..., Any],
    right_at: float,
    rows: Callable[[int, int], Sequence[dict[str, Any]]],
) -> None:
    """The command line of a recipe's evaluate.py. `rows(tasks per difficulty, seed)` makes the tasks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=default_model, help=f"folder made by prepare.py --model, or a checkpoint of it ({default_model})"
    )
    parser.add_argument("--tasks", type=int, default=20, help="tasks per difficulty (20)")
    parser.add_argument("--response-length", type=int, default=1024, help="token budget of an episode, as data.max_response_length (1024)")
    parser.add_argument("--max-turns", type=int, default=12, help="assistant turns at most (12)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the tasks and of the sampling (1)")
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # verl's parser logs every malformed call; a policy at work makes many
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    player = Player(args.model, tools(), score, args.response_length, args.max_turns)
    drawn = rows(args.tasks, args.seed)
    report("greedy", player.play(drawn, temperature=0.0), right_at)
    report("sampled at temperature 1", player.play(drawn, temperature=1.0), right_at)
