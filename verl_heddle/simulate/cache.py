"""The KV cache of one replica: tokens of running requests, vLLM's automatic prefix cache, and a tier in host memory for evicted tokens.

Law: a token is either in use (a running request refers to it) or held (no running request does, but a later one may hit it). Held tokens
count as free space: if in use + held exceeds the capacity, they are evicted, least recently released first and from the end of each prefix.
The engine evicts at every step boundary, for the tokens of the next step, and when a request takes a slot. A trajectory's own tokens are
one entry. The shared prompt of a group is another, counted once however many requests use it. An own entry is a hit only if its whole
prompt is cached too.

Tier: evicted tokens move to the tier instead of being lost, and are read back when a request that continues them takes a slot. Eviction
takes the end of a prefix, so an entry's tokens in the tier directly follow its tokens that are still held. If the tier exceeds its own
capacity, it drops the entry evicted longest ago, again from the end.

Invariants: `in_use` >= 0 and `held` >= 0; after `evict`, in use + held <= capacity whenever in use <= capacity; tokens in the tier <= the
tier's capacity.
Source: vLLM `v1/core/kv_cache_manager.py` and `block_pool.py` (free queue in LRU order, tail blocks first).
Cost: O(1) per call, amortised.
"""

from __future__ import annotations

from collections import OrderedDict

from verl_heddle.simulate.workload import Request


class PrefixCache:
    """Tokens by trajectory and by group.

    Args:
        capacity: tokens; None: unlimited.
        block: prefixes are reused in whole blocks of this many tokens.
        enabled: False: no reuse at all.
        tier: capacity of the host tier in tokens; inf: unlimited, 0: no tier.
    """

    __slots__ = ("_enabled", "_free", "_tier", "_users", "block", "capacity", "held", "in_use", "tier", "tiered")

    def __init__(self, capacity: int | None, block: int, enabled: bool, tier: float = 0) -> None:
        self.capacity = capacity
        self.block = block
        self.in_use = 0
        """Tokens that running requests refer to; the engine adds the tokens they generate."""
        self.held = 0
        self.tier = tier if enabled else 0
        self.tiered = 0
        """Tokens in the tier."""
        self._tier: OrderedDict[int, int] = OrderedDict()
        """Tokens in the tier, keys as in `_free`; oldest eviction first."""
        self._enabled = enabled
        self._free: OrderedDict[int, int] = OrderedDict()
        """Held tokens by trajectory number, or by ~group for a shared prompt; oldest release first."""
        self._users: dict[int, int] = {}
        """Running requests that share a prompt, by group."""

    def hit(self, request: Request) -> tuple[int, int]:
        """Leading tokens of the request's context that need no prefill, and how many of these are read back from the tier. At least one
        token is always computed."""
        if not self._enabled:
            return 0, 0
        shared, group, index = request.shared, request.trajectory.group, request.trajectory.index
        here, found = shared, shared
        if shared and group not in self._users:
            here = self._free.get(~group, 0)
            found = min(shared, here + self._tier.get(~group, 0))
        if found == shared:
            own = self._free.get(index, 0)
            here += own
            found += own + self._tier.get(index, 0)
        block = self.block
        cached = min(found, request.context - 1) // block * block
        return cached, max(0, cached - here)

    def need(self, request: Request) -> int:
        """Tokens by which `in_use` grows if the request takes a slot."""
        shared = request.shared
        return request.context - shared if shared and request.trajectory.group in self._users else request.context

    def alone(self, request: Request, context: int) -> int:
        """Tokens of a running request's context that no other running request uses."""
        return context - request.shared if request.shared and self._users[request.trajectory.group] > 1 else context

    def acquire(self, request: Request) -> None:
        """The request takes a slot: count its whole context as in use."""
        free = self._free
        self.held -= free.pop(request.trajectory.index, 0)
        if self._tier:
            self._leave_tier(request.trajectory.index)
        shared = request.shared
        self.in_use += request.context - shared
        if shared:
            group = request.trajectory.group
            users = self._users.get(group, 0)
            if not users:
                self.held -= free.pop(~group, 0)
                self._leave_tier(~group)
                self.in_use += shared
            self._users[group] = users + 1
        if self.capacity is not None and self.in_use + self.held > self.capacity:
            self.evict()

    def release(self, request: Request, computed: int) -> None:
        """The request leaves its slot: hold the whole blocks of its first `computed` tokens. Its `context` is up to date."""
        shared, state = request.shared, request.trajectory
        self.in_use -= request.context - shared
        computed = computed // self.block * self.block if self._enabled else 0
        if computed > shared and shared == state.shared:
            self._hold(state.index, computed - shared)
        if shared:
            users = self._users[state.group] - 1
            if users:
                self._users[state.group] = users
            else:
                del self._users[state.group]
                self.in_use -= shared
                self._hold(~state.group, min(shared, computed))

    def trim(self, state_index: int, own_tokens: int) -> None:
        """The trajectory's context changed: keep at most `own_tokens` of its tokens beyond the prompt."""
        entry, behind = self._free.get(state_index, 0), self._tier.get(state_index, 0)
        if entry + behind <= own_tokens:
            return
        kept = max(0, own_tokens) // self.block * self.block
        if behind:
            left = max(0, kept - entry)
            self._tier[state_index] = left
            self.tiered -= behind - left
        if entry > kept:
            self._free[state_index] = kept
            self.held -= entry - kept

    def demote(self, state_index: int) -> None:
        """Evict the trajectory's held tokens before all others: no turn will need them soon."""
        if state_index in self._free:
            self._free.move_to_end(state_index, last=False)

    def clear(self) -> None:
        """Drop everything that is not in use, in the tier too, because the weights have changed."""
        self._free.clear()
        self._tier.clear()
        self.held = self.tiered = 0

    def evict(self) -> None:
        """Evict held tokens, oldest first, until everything fits or none are left."""
        if self.capacity is None:
            return
        over = self.in_use + self.held - self.capacity
        free = self._free
        while over > 0 and free:
            key = next(iter(free))
            entry = free[key]
            lost = min(entry, -(-over // self.block) * self.block)
            if lost == entry:
                del free[key]
            else:
                free[key] = entry - lost
            self.held -= lost
            over -= lost
            if self.tier:
                self._to_tier(key, lost)

    def _to_tier(self, key: int, tokens: int) -> None:
        """Move tokens from the end of a held entry to the tier, which drops its oldest entries to make room."""
        tier = self._tier
        tier[key] = tier.pop(key, 0) + tokens
        self.tiered += tokens
        while self.tiered > self.tier:
            oldest = next(iter(tier))
            entry = tier[oldest]
            lost = min(entry, -(-int(self.tiered - self.tier) // self.block) * self.block)
            if lost == entry:
                del tier[oldest]
            else:
                tier[oldest] = entry - lost
            self.tiered -= lost

    def _leave_tier(self, key: int) -> None:
        self.tiered -= self._tier.pop(key, 0)

    def _hold(self, key: int, tokens: int) -> None:
        self._leave_tier(key)  # the tier's tokens continue an outdated context, or they would have been read back
        self.held += tokens - self._free.pop(key, 0)
        if tokens:
            self._free[key] = tokens
