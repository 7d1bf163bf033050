"""What is told of samples: quantiles, and ratios of what was measured side by side."""

QUANTILES = (0.2, 0.5, 0.8)


def quantiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80, and how many samples."""
    ordered = sorted(samples)
    names = (f"p{round(100 * q)}" for q in QUANTILES)
    at = (ordered[round(q * (len(ordered) - 1))] for q in QUANTILES)
    return {**dict(zip(names, at, strict=True)), "samples": len(ordered)}


def paired_ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times faster ours is, round by round."""
    pairs = zip(theirs, ours, strict=True)
    return quantiles([their / max(our, 1e-12) for their, our in pairs])
