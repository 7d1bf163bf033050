"""A pytest plugin: tests in bfloat16 first, so that a run that is cut short has shown them.

    pytest -n 14 --dist worksteal -p bench.suite.order

Each process starts with an equal share of neighbouring tests; within that share they are sorted.
"""

import os

import pytest


@pytest.hookimpl(trylast=True)  # after tests were deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    start = 0
    for shares in range(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 0, -1):
        end = start + (len(items) - start) // shares
        items[start:end] = sorted(items[start:end], key=lambda item: "bfloat16" not in item.nodeid)
        start = end
