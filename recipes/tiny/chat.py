"""The chat format of tiny policies: template, tokenizer and training labels. A recipe adds the conversations (`Lesson`).

The template is Qwen's ChatML with hermes tool calls, so verl's `hermes` parser and its Qwen tokenization of multi-turn chats apply as
they are. It shows a tool as a signature and a sentence instead of a JSON schema, which would be most of every prompt.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

Message = dict[str, Any]

# Tokens, but not special ones: verl scores a text decoded without special tokens, and the reward needs to see these.
TAG_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
MAX_VOCABULARY = 512

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


@dataclass(frozen=True)
class Lesson:
    """What a tiny policy learns from.

    `schemas`: of the tools, as verl puts them into the prompt. `corpus`: a few conversations to train the tokenizer on. `example`: one
    reference conversation, its difficulty uniform rather than long-tailed as in the tasks: with the tail as rare as there, the
    model would never solve it. `phrases`: long texts that every call repeats, each made one token: a model this small learns to copy
    only where most tokens matter. `training`: what differs from the defaults of `model.Settings`.
    """

    schemas: Sequence[Any]
    corpus: Sequence[Sequence[Message]]
    example: Callable[[random.Random], Sequence[Message]]
    phrases: Sequence[str] = ()
    training: Mapping[str, Any] = field(default_factory=dict)


def tool_call(name: str, **arguments: Any) -> Message:
    """The assistant message that makes one tool call."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def make_tokenizer(lesson: Lesson) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of under 512 tokens, trained on the lesson's corpus; any text round-trips (NFC).

    It is a `Qwen2Tokenizer`, with that class's way of splitting text before BPE (each digit is a token), because transformers loads
    the tokenizer of every model of type qwen2 as that class, whatever class saved it: another splitting would be lost on loading.
    """
    untrained = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"])
    untrained.chat_template = CHAT_TEMPLATE
    whole = [*TAG_TOKENS, *lesson.phrases]
    tags = re.compile("|".join(map(re.escape, whole)))
    texts = [str(untrained.apply_chat_template(talk, tools=lesson.schemas, tokenize=False)) for talk in lesson.corpus]
    corpus = [part for text in texts for part in tags.split(text)]
    tokenizer = untrained.train_new_from_iterator(corpus, MAX_VOCABULARY, min_frequency=2, show_progress=False)
    tokenizer.add_tokens(whole)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Any], conversation: Sequence[Message]) -> tuple[list[int], list[int]]:
    """A conversation as (token ids, labels), two lists of one length.

    A label is the token's own id where the assistant speaks, `<|im_end|>` included, and -100 elsewhere.
    """
    text = tokenizer.apply_chat_template(conversation, tools=schemas, tokenize=False)
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
