"""The chat format of the tiny policy: template, reference conversation, tokenizer, and training labels.

A conversation of difficulty 2, as the model sees it (the system message holds the tool schema; <|im_start|> and <|im_end|> left out):

    user       Simplify 3+4-2.
    assistant  <tool_call>{"name": "simplify", "arguments": {"expression": "3+4-2"}}</tool_call>
    user       <tool_response>7-2</tool_response>
    assistant  <tool_call>{"name": "simplify", "arguments": {"expression": "7-2"}}</tool_call>
    user       <tool_response>5</tool_response>
    assistant  The answer is 5.

The one skill is to copy the latest tool response into the next call, until it is a plain number.

The template is Qwen's ChatML with hermes tool calls, so verl's `hermes` parser and its Qwen tokenization of multi-turn chats apply as
they are. It shows a tool as a signature and a sentence instead of a JSON schema, which would be most of every prompt.
"""

import itertools
import random
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer
from verl.tools.function_tool import load_function_tools_from_path

from recipes.math import tasks

Message = dict[str, Any]

# Tokens, but not special ones: verl scores a text decoded without special tokens, and the reward needs to see these.
TAG_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
MAX_VOCABULARY = 512
CORPUS_CONVERSATIONS = 50

CHAT_TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}
{%- for tool in tools %}{%- set f = tool.function or tool %}
{{- f.name + '(' + (f.parameters.properties | join(', ')) + '): ' + f.description + '\n' }}
{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>' + message.content + '</tool_response><|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{%- set f = call.function or call %}
{{- '<tool_call>{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else (f.arguments | tojson) }}{{- '}</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def tool_schemas() -> list[Any]:
    """The schemas of tools.py as verl's agent loop puts them into the prompt."""
    tools = load_function_tools_from_path(str(Path(__file__).with_name("tools.py")))
    return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]


def tool_call(expression: str) -> Message:
    """The assistant message that asks for one step of `expression`."""
    function = {"name": "simplify", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def conversation(expression: str) -> list[Message]:
    """The reference episode for a well-formed `expression` of k operations: 1 user, k + 1 assistant and k tool messages."""
    path = tasks.steps(expression)
    messages: list[Message] = [{"role": "user", "content": tasks.prompt_of(expression)}]
    for before, after in itertools.pairwise(path):
        messages += [tool_call(before), {"role": "tool", "content": after}]
    return [*messages, {"role": "assistant", "content": f"The answer is {path[-1]}."}]


def make_tokenizer(schemas: list[Any]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of under 512 tokens, trained on a few reference conversations; any text round-trips (NFC).

    It is a `Qwen2Tokenizer`, with that class's way of splitting text before BPE (each digit is a token), because transformers loads
    the tokenizer of every model of type qwen2 as that class, whatever class saved it: another splitting would be lost on loading.
    """
    untrained = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"])
    untrained.chat_template = CHAT_TEMPLATE
    tags = re.compile("|".join(map(re.escape, TAG_TOKENS)))
    expressions = tasks.draw_tasks(CORPUS_CONVERSATIONS, random.Random(0))
    texts = [str(untrained.apply_chat_template(conversation(e), tools=schemas, tokenize=False)) for e in expressions]
    corpus = [part for text in texts for part in tags.split(text)]
    tokenizer = untrained.train_new_from_iterator(corpus, MAX_VOCABULARY, min_frequency=2, show_progress=False)
    tokenizer.add_tokens(TAG_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, schemas: list[Any], expression: str) -> tuple[list[int], list[int]]:
    """The reference conversation as (token ids, labels), two lists of one length.

    A label is the token's own id where the assistant speaks, `<|im_end|>` included, and -100 elsewhere.
    """
    text = tokenizer.apply_chat_template(conversation(expression), tools=schemas, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    labels, speaking = [-100] * len(ids), False
    for i, token in enumerate(ids):
        if speaking:
            labels[i] = token
            speaking = token != tokenizer.eos_token_id
        elif ids[max(0, i + 1 - len(header)) : i + 1] == header:
            speaking = True
    return ids, labels
