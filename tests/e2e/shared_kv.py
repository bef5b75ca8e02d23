"""A KV connector for tests on a machine without a GPU: engines share the blocks of their KV caches through a folder, by content.

Law: every full block that has been computed, of prompt and of answer, is written under the digest of all tokens up to its end; a request
finds as many blocks as stand there for its beginning, and reads them before its forward pass. It speaks the interface that vLLM's
connectors for shared stores speak (LMCache, Mooncake store), synchronously, for one worker, and never deletes: real KV, no product.

It is named to vLLM by `kv_connector_module_path`, like any connector from outside; see docs/placement.md for why none of vLLM's own serves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata


@dataclass
class Orders(KVConnectorMetadata):
    """For one step of the worker: (digest, number of the block)."""

    load: list[tuple[str, int]] = field(default_factory=list)
    save: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Known:
    """A request of the scheduler's side: its blocks, and how many of them are in the folder or ordered to be."""

    request: Any
    blocks: list[int]
    stored: int = 0


class SharedFolder(KVConnectorBase_V1):
    """See the module. Extra configuration: `folder`."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._folder = Path(self._kv_transfer_config.get_from_extra_config("folder", None))
        self._size = vllm_config.cache_config.block_size
        self._known: dict[str, Known] = {}
        self._orders = Orders()
        self._caches: dict[str, torch.Tensor] = {}

    # --- in the scheduler --------------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        tokens, found = request.all_token_ids, num_computed_tokens // self._size
        while (found + 1) * self._size < len(tokens) and self._path(self._digest(tokens, found)).exists():
            found += 1
        return max(0, found * self._size - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        numbers = list(blocks.get_block_ids()[0])
        known = self._known[request.request_id] = Known(request, numbers)
        if num_external_tokens:
            end = (request.num_computed_tokens + num_external_tokens) // self._size
            first = end - num_external_tokens // self._size
            self._orders.load += [(self._digest(request.all_token_ids, at), numbers[at]) for at in range(first, end)]
            known.stored = end

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        for new in scheduler_output.scheduled_new_reqs:
            self._known[new.req_id].blocks = list(new.block_ids[0])
            self._save(new.req_id, new.num_computed_tokens + scheduler_output.num_scheduled_tokens[new.req_id])
        cached = scheduler_output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            more = cached.new_block_ids[number]
            if more is not None:
                known = self._known[name]
                known.blocks = list(more[0]) if name in cached.resumed_req_ids else known.blocks + list(more[0])
            self._save(name, cached.num_computed_tokens[number] + scheduler_output.num_scheduled_tokens[name])
        orders, self._orders = self._orders, Orders()
        return orders

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._known.pop(request.request_id, None)
        return False, None

    def _save(self, name: str, computed: int) -> None:
        known = self._known[name]
        full = min(computed, len(known.request.all_token_ids)) // self._size
        for at in range(known.stored, full):
            self._orders.save.append((self._digest(known.request.all_token_ids, at), known.blocks[at]))
        known.stored = max(known.stored, full)

    def _digest(self, tokens: Any, at: int) -> str:
        return sha256(str(list(tokens[: (at + 1) * self._size])).encode()).hexdigest()

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    # --- in the worker -----------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for digest, block in self._get_connector_metadata().load:
            for layer, rows in load_file(self._path(digest)).items():
                self._caches[layer][block].copy_(rows)

    def wait_for_save(self) -> None:
        for digest, block in self._get_connector_metadata().save:
            path = self._path(digest)
            if not path.exists():
                part = path.with_suffix(f".{os.getpid()}")
                save_file({layer: cache[block].contiguous() for layer, cache in self._caches.items()}, part)
                part.rename(path)  # another engine sees all of it or nothing

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return
