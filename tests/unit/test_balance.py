"""Shares of rows: whole, equally many, alike in cost, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from partwise.data.balance import row_cost, share_rows
from partwise.records import Conversation, Image, Message, Text


def mixed_costs(num_rows: int, seed: int) -> list[int]:
    """Texts of log-normal length, up to 2048 tokens, with no to four images of 1000."""
    rng = np.random.default_rng(seed)
    texts = np.minimum(rng.lognormal(5, 1.2, num_rows), 2048).astype(int)
    return (texts + 1000 * rng.choice(5, num_rows, p=[0.4, 0.4, 0.1, 0, 0.1])).tolist()


def imbalance(costs: list[int], shares: list[list[int]]) -> float:
    """What ranks wait for the dearest share: its cost over the mean."""
    loads = [sum(costs[position] for position in share) for share in shares]
    return max(loads) / np.mean(loads)


def test_a_small_case_by_hand() -> None:
    assert share_rows([9, 1, 8, 2, 2], 2) == [[0, 4], [1, 2, 3]]


@pytest.mark.parametrize("num_rows", [0, 1, 3, 7, 8, 9, 63, 64, 65])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_each_row_comes_once_and_counts_differ_by_one_at_most(num_rows: int, num_ranks: int) -> None:
    shares = share_rows(mixed_costs(num_rows, seed=0), num_ranks)
    assert len(shares) == num_ranks
    assert sorted(position for share in shares for position in share) == list(range(num_rows))
    assert all(share == sorted(share) for share in shares)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_rows_of_equal_cost_go_round() -> None:
    assert share_rows([5] * 6, 3) == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(("num_ranks", "worst"), [(2, 1.01), (8, 1.03), (64, 1.03)])
def test_shares_are_far_more_alike_than_round_robin(num_ranks: int, worst: float) -> None:
    balanced, plain = [], []
    for seed in range(20):
        costs = mixed_costs(8 * num_ranks, seed)
        balanced.append(imbalance(costs, share_rows(costs, num_ranks)))
        plain.append(imbalance(costs, [list(range(r, len(costs), num_ranks)) for r in range(num_ranks)]))
    print(f"{num_ranks} ranks: balanced {np.mean(balanced):.3f}, round robin {np.mean(plain):.3f}")
    assert np.mean(balanced) < worst
    assert np.mean(balanced) - 1 < (np.mean(plain) - 1) / 10


def test_cost_is_cut_text_and_images() -> None:
    image = Image("no/such/file.png", "a")
    messages = (
        Message("user", (image, Text("x" * 100), image)),
        Message("assistant", (Text("y" * 60),)),
    )
    assert row_cost(Conversation(messages, "a.jsonl", 0), max_seq_len=512) == 2 * 1000 + 40
    assert row_cost(Conversation(messages, "a.jsonl", 0), max_seq_len=16) == 2 * 1000 + 16
