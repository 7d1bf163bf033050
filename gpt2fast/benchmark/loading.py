"""From the start of a process to its first token, and what memory it takes."""

import json
import subprocess
import sys
import time
from typing import Any

from gpt2fast.benchmark.contest import Report, Say, Start, generated, tokens
from gpt2fast.benchmark.environment import ROOT
from gpt2fast.benchmark.processes import Failed
from gpt2fast.benchmark.statistics import paired_ratios, quantiles
from gpt2fast.benchmark.table import TORCH

# Prompt and new tokens after which memory is read.
TEXT = (512, 64)

_IMPORTS = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import gpt2fast
{names}
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""


def imports(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of ``import torch`` and of what comes on top, in fresh processes.

    "gpt2fast" is the package, "model" the package with the model's class and all that it needs.
    """
    kinds = {"gpt2fast": "", "model": "from gpt2fast import GPT2LMHeadModel"}
    seconds: dict[str, list[float]] = {"torch": [], **{kind: [] for kind in kinds}}
    for _ in range(1 + rounds):
        for kind, names in kinds.items():
            command = [sys.executable, "-c", _IMPORTS.format(names=names)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            torch, more = json.loads(done.stdout)
            seconds["torch"].append(torch)
            seconds[kind].append(more)
    # The first round was the warm-up.
    return {
        kind: quantiles(samples[len(samples) // (1 + rounds) :])
        for kind, samples in seconds.items()
    }


def loading(
    model: str, names: tuple[str, ...], base: str, rounds: int, start: Start, say: Say
) -> Report:
    """The record of a model: each contender in fresh processes, in turns."""
    reports: dict[str, Report] = {name: {} for name in names}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for name in names:
        process = start(name)
        try:
            process.ask("prepare")
        except Failed as error:
            reports[name] = {"not measured": str(error)}
        finally:
            process.close()
    for turn in range(1 + rounds):  # the first reads files and writes compiled Python
        for name in names:
            if "not measured" in reports[name]:
                continue
            say(f"turn {turn} of {rounds}: {name}")
            try:
                sample, peak = _once(name, start, with_memory=turn == rounds)
            except Failed as error:
                reports[name] = {"not measured": str(error)}
                continue
            if turn:
                samples[name].append(sample)
            if peak is not None:
                reports[name]["peak_bytes"] = peak
    for name, taken in samples.items():
        if taken and "not measured" not in reports[name]:
            for key in taken[0]:
                reports[name][key] = quantiles([sample[key] for sample in taken])
            if samples.get(base):
                reports[name]["times_base"] = paired_ratios(
                    [sample["first_token"] for sample in taken],
                    [sample["first_token"] for sample in samples[base]],
                )
    return {"model": model, "rounds": rounds, "text": TEXT, "contenders": reports}


def _once(name: str, start: Start, with_memory: bool) -> tuple[dict[str, float], int | None]:
    """Seconds "load" (with imports) and "first_token" since the start of a process; its peak."""
    begin = time.perf_counter()
    process = start(name)
    try:
        load = process.ask("load")["seconds"]
        if name != TORCH:
            generated(process, tokens(8, seed=2), 1)
        sample = {"load": load, "first_token": time.perf_counter() - begin}
        if not with_memory:
            return sample, None
        if name != TORCH:
            prompt, new = TEXT
            generated(process, tokens(prompt, seed=2), new)
        peak: Any = process.ask("memory")["peak_bytes"]
        return sample, peak
    finally:
        process.close()
