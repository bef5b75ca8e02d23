"""Make a tiny policy: a 0.6 MB Qwen2 (2 layers, hidden 64) and its own tokenizer, trained from scratch.

It learns the reference conversations of a lesson by next-token prediction on what the assistant says. Training stops early on purpose:
the policy works reliably on short tasks and fails on many long ones, so that reinforcement learning has something to learn and a
group of samples has both right and wrong answers.

Everything is seeded and single-threaded (one thread is as fast as two at this size, and far faster on a busy machine).
`vocab_size == len(tokenizer)`: vLLM under verl masks token ids past the tokenizer and the trainer does not, so a padded vocabulary
would make the log-probabilities of rollout and trainer differ.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from recipes.tiny import chat

Batch = list[tuple[list[int], list[int]]]  # (token ids, labels) per conversation


@dataclass(frozen=True)
class Settings:
    """Size of the model and its training. `batch_tokens` counts padding."""

    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 2
    heads: int = 2  # of size 32, the smallest that vLLM's CPU attention takes
    initializer_range: float = 0.05
    seed: int = 0
    steps: int = 700
    batch_tokens: int = 1000  # small batches: the number of updates is what counts here
    learning_rate: float = 2e-3
    warmup_steps: int = 20


def make_model(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Qwen2ForCausalLM:
    """An untrained model from the global torch seed, its first layer already looking at the previous tokens."""
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            initializer_range=settings.initializer_range,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: Qwen2ForCausalLM) -> None:
    """Make head h of the first layer attend to the token h + 1 places back, by its query and key biases alone.

    Copying takes an induction circuit: a first layer that marks each token with those before it, and a second one that searches for
    the mark. Finding the first half is most of the training time of a small model, so it is given (and stays trainable).

    With query bias v = (1, ..., 1) at position m and key bias R(d) v at position n, where R is the rotary rotation, the score is
    v . R(n + d - m) v / sqrt(head_dim), which is largest, sqrt(head_dim), at n = m - d.
    """
    attention, inv_freq = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq
    query = attention.q_proj.bias.view(-1, attention.head_dim)  # (heads, head_dim)
    key = attention.k_proj.bias.view(-1, attention.head_dim)
    for head in range(query.shape[0]):
        cos, sin = torch.cos((head + 1) * inv_freq), torch.sin((head + 1) * inv_freq)
        query[head] = 1.0
        key[head] = torch.cat([cos - sin, cos + sin])


def batches(
    tokenizer: PreTrainedTokenizerBase, lesson: chat.Lesson, settings: Settings, rng: random.Random, pool: int = 256
) -> Iterator[Batch]:
    """Endless fresh batches of at most `batch_tokens` padded tokens; conversations of similar length go together."""
    while True:
        examples = [chat.encode(tokenizer, lesson.schemas, lesson.example(rng)) for _ in range(pool)]
        cut: list[Batch] = [[]]
        for example in sorted(examples, key=lambda example: len(example[0])):
            if cut[-1] and (len(cut[-1]) + 1) * len(example[0]) > settings.batch_tokens:
                cut.append([])
            cut[-1].append(example)
        rng.shuffle(cut)
        yield from cut


def loss_of(model: Qwen2ForCausalLM, batch: Batch, pad_token_id: int) -> torch.Tensor:
    """Mean cross-entropy per assistant token, in nats. Padding on the right needs no mask: no label comes after it."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids, _ in batch])  # (conversations, width)
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch])[:, 1:]
    spoken = labels != -100
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    return functional.cross_entropy(model.lm_head(hidden[spoken]), labels[spoken])  # logits only where there is a label


def train(model: Qwen2ForCausalLM, stream: Iterator[Batch], settings: Settings, pad_token_id: int) -> float:
    """Train in place with AdamW and a linear decay; prints progress; returns the mean loss of the last 50 steps, in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / settings.warmup_steps, 1.0) * (1 - step / settings.steps)
    )
    recent: list[float] = []
    model.train()
    for step in range(1, settings.steps + 1):
        loss = loss_of(model, next(stream), pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = [*recent[-49:], loss.item()]
        if step % 100 == 0 or step == settings.steps:
            print(f"  step {step}/{settings.steps}, loss {sum(recent) / len(recent):.3f}", flush=True)
    model.eval()
    return sum(recent) / len(recent)


def build(folder: Path, lesson: chat.Lesson) -> dict[str, Any]:
    """Train on `lesson`, and write model and tokenizer into `folder`; sets torch to one thread.

    Returns what it made: settings, number of parameters, vocabulary, final loss in nats, seconds.
    """
    settings = Settings(**lesson.training)
    disable_progress_bar()  # of writing one small file
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    start = time.perf_counter()
    tokenizer = chat.make_tokenizer(lesson)
    model = make_model(tokenizer, settings)
    loss = train(model, batches(tokenizer, lesson, settings, random.Random(settings.seed)), settings, tokenizer.pad_token_id)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return {
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "loss": round(loss, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }
