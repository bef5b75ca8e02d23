"""Play the tasks with a tiny policy, without verl's trainer or an inference engine, and print how it does per difficulty.

    python recipes/math/evaluate.py --model outputs/math/tiny_model

Prompts, tool calls, multi-turn tokenization and reward are the ones of a verl run: verl's tool parser and chat builder, this recipe's
tool and reward. Episodes advance in lockstep, one batched generation per turn. "right" is the share of episodes with the right answer.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import load_function_tools_from_path
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.math import chat, reward, tasks

MAX_TURN_TOKENS = 64  # a regular call takes at most 45; verl lets a message that does not end run on to the end of the episode's budget


@dataclass
class Episode:
    """One task being played: `ids` is the whole token stream, prompt included."""

    expression: str
    messages: list[chat.Message]
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

    def __init__(self, folder: str, response_length: int, max_turns: int) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tools = {tool.name: tool for tool in load_function_tools_from_path(str(Path(__file__).with_name("tools.py")))}
        self.schemas = chat.tool_schemas()
        self.parser = ToolParser.get_tool_parser("hermes", self.tokenizer)
        self.builder = create_continuous_token_builder(self.tokenizer, hf_model_type="qwen2")
        self.response_length, self.max_turns = response_length, max_turns

    def play(self, expressions: list[str], temperature: float) -> list[Episode]:
        """One finished, scored episode per expression."""
        episodes = []
        for expression in expressions:
            messages: list[chat.Message] = [{"role": "user", "content": tasks.prompt_of(expression)}]
            ids = self.builder.build_initial_tokens(messages, tools=self.schemas)
            episodes.append(Episode(expression, messages, ids, prompt_tokens=len(ids)))
        while active := [e for e in episodes if not e.over]:
            for episode, new_ids in zip(active, self._generate(active, temperature), strict=True):
                asyncio.run(self._advance(episode, new_ids))
        for episode in episodes:
            text = str(self.tokenizer.decode(episode.ids[episode.prompt_tokens :][: self.response_length], skip_special_tokens=True))
            row = tasks.to_row(episode.expression, 0, "eval")
            episode.score = reward.compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"])
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
        responses = [{"role": "tool", "content": await self._call(calls[0])}]  # verl, too, runs one call per turn by default
        merged = self.builder.merge_context_tokens(before, before + responses, episode.ids, tools=self.schemas)
        episode.messages, episode.ids = before + responses, merged.token_ids
        episode.over = episode.response_tokens >= self.response_length

    async def _call(self, call: FunctionCall) -> str:
        try:
            return await self.tools[call.name].call(json.loads(call.arguments))
        except Exception as error:  # a policy can send anything; verl answers with a text as well
            return f"Error executing tool '{call.name}': {error}"


def report(title: str, episodes: list[Episode]) -> None:
    """Print one line per difficulty, and one for all tasks weighted by their probability in the data."""
    print(f"\n{title}\ndifficulty  right  reward  turns p50/max  response tokens p50/max")
    weights, right_overall = tasks.difficulty_probabilities(), 0.0
    for difficulty in range(1, tasks.MAX_DIFFICULTY + 1):
        group = [e for e in episodes if len(tasks.steps(e.expression)) == difficulty + 1]
        right = sum(e.score >= reward.CORRECT for e in group) / len(group)
        right_overall += weights[difficulty - 1] * right
        turns, tokens = [e.turns for e in group], [e.response_tokens for e in group]
        print(
            f"{difficulty:10d}  {right:5.2f}  {statistics.mean(e.score for e in group):6.2f}"
            f"  {statistics.median(turns):7.0f}/{max(turns):<5d}  {statistics.median(tokens):15.0f}/{max(tokens)}"
        )
    print(f"  all tasks  {right_overall:.2f}  (weighted by the difficulty distribution of the data)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/math/tiny_model", help="folder made by prepare.py --model, or a checkpoint of it")
    parser.add_argument("--tasks", type=int, default=20, help="tasks per difficulty (20)")
    parser.add_argument("--response-length", type=int, default=1024, help="token budget of an episode, as data.max_response_length (1024)")
    parser.add_argument("--max-turns", type=int, default=12, help="assistant turns at most (12)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the tasks and of the sampling (1)")
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # verl's parser logs every malformed call; a policy at work makes many
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    expressions = [tasks.draw_expression(k, rng) for k in range(1, tasks.MAX_DIFFICULTY + 1) for _ in range(args.tasks)]
    player = Player(args.model, args.response_length, args.max_turns)
    report("greedy", player.play(expressions, temperature=0.0))
    report("sampled at temperature 1", player.play(expressions, temperature=1.0))


if __name__ == "__main__":
    main()
