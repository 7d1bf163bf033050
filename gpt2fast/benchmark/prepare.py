"""Builds the models in every contender's format, so that no benchmark spends its time on that.

    python -m gpt2fast.benchmark.prepare [MODEL ...]

By default gpt2 and gpt2-medium.
"""

import sys

from gpt2fast.benchmark.processes import Failed, Process
from gpt2fast.benchmark.table import COMPANIES


def main() -> None:
    names = dict.fromkeys(name for company in COMPANIES.values() for name in company)
    for model in sys.argv[1:] or ["gpt2", "gpt2-medium"]:
        for name in names:
            # A process each: converting takes several times the model's memory.
            process = Process(name, model, 1)
            try:
                process.ask("prepare")
                print(f"{model}: {name}", flush=True)
            except Failed as error:
                print(f"{model}: {name}: {error}", flush=True)
            finally:
                process.close()


if __name__ == "__main__":
    main()
