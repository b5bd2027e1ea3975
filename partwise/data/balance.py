"""Rows of a step -> the share of each rank, alike in work, from what is known before a row is encoded.

In: what each row costs, in tokens. Out: which rows each rank has. Ranks wait for the slowest one, so its
share is what a step takes. Only integers are compared: every machine finds the same shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from partwise.records import Conversation

# About what the vision tower and an image's own tokens take, and how much text is a token.
TOKENS_PER_IMAGE = 1000
CHARACTERS_PER_TOKEN = 4


def row_cost(conversation: Conversation, max_seq_len: int) -> int:
    """About how many tokens of text the row is worth; no image is decoded for that."""
    num_text_tokens = min(conversation.num_characters // CHARACTERS_PER_TOKEN, max_seq_len)
    return num_text_tokens + TOKENS_PER_IMAGE * len(conversation.images)


def share_rows(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """For each rank its positions in `costs`, ascending: equally many up to one, of about equal cost.

    The dearest row first, each goes to the rank that has the least so far and still room.
    Example: costs (9, 1, 8, 2, 2) on 2 ranks -> [0, 4] and [1, 2, 3], 11 each.
    """
    num_rows, num_longer = divmod(len(costs), num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        load, rank = heappop(loads)
        while len(shares[rank]) == num_rows and not num_longer:
            load, rank = heappop(loads)  # a full rank is not put back
        num_longer -= len(shares[rank]) == num_rows
        shares[rank].append(position)
        if len(shares[rank]) <= num_rows:
            heappush(loads, (load + costs[position], rank))
    return [sorted(share) for share in shares]
