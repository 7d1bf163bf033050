"""Count models that a trained network must beat: unigram and smoothed bigram."""

import numpy as np


def unigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """Mean negative log-likelihood of ``valid[1:]`` under add-one unigram counts of ``train``.

    Both uint16 ``[n]``. The first token is left out because the bigram has nothing to say on it.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[valid[1:]].mean())


def bigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """The same under an interpolated Kneser-Ney bigram (Chen and Goodman 1999, section 4.1.6).

    p(w | u) = max(c(u, w) - D, 0) / c(u) + D * N(u) / c(u) * p(w), where N(u) is the number of
    distinct successors of u, p(w) the add-one share of distinct predecessors that w has, and the
    discount D = n1 / (n1 + 2 n2) comes from the numbers of bigrams seen once and twice.
    """
    pairs = train[:-1].astype(np.int64) * vocab_size + train[1:]
    seen, counts = np.unique(pairs, return_counts=True)
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once else 0.5
    first, second = np.divmod(seen, vocab_size)
    totals = np.bincount(first, weights=counts, minlength=vocab_size)
    successors = np.bincount(first, minlength=vocab_size)
    predecessors = np.bincount(second, minlength=vocab_size) + 1.0
    continuation = predecessors / predecessors.sum()

    u, w = valid[:-1].astype(np.int64), valid[1:].astype(np.int64)
    wanted = u * vocab_size + w
    at = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    count = np.where(seen[at] == wanted, counts[at], 0)
    total = np.maximum(totals[u], 1.0)
    left = np.where(totals[u] > 0, discount * successors[u] / total, 1.0)
    probability = np.maximum(count - discount, 0) / total + left * continuation[w]
    return float(-np.log(probability).mean())
