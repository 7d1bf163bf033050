# Every target works from a fresh clone: it makes the virtual environment it needs in $(VENV),
# with the tested versions of constraints.txt, and refreshes it when one of those files changes.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= It was a dark night, and the old house
ARGS ?=

BIN = $(VENV)/bin
install = $(BIN)/python -m pip install --constraint constraints.txt --editable $(1) && touch $@

.PHONY: help demo test peers lint docs types guard bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

# One thread: the bundled model is small, and threads that wait for a busy core cost it tenfold.
demo: $(VENV)/demo.stamp ## generate text from the bundled checkpoint, offline
	$(BIN)/gpt2fast generate --model bundled --threads 1 --seed 0 "$(PROMPT)"

# Two processes of one thread: the tensors are small, and most of the time is Python's.
test: $(VENV)/test.stamp ## run the tests; ARGS="-k name" reaches pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

peers: $(VENV)/test.stamp ## run others' tests on this library; fails where the table was better
	$(BIN)/python -m tests.peers $(ARGS)

# mypy and mkdocs see no editable install: lay the rooms out by links, as they install.
types:
	@rm -rf build/types && mkdir -p build/types/gpt2fast
	@ln -s "$(CURDIR)"/gpt2fast/* "$(CURDIR)/kernels" "$(CURDIR)/tokenizer" build/types/gpt2fast/

lint: $(VENV)/dev.stamp types ## check format, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/docs.stamp types ## make the documentation in build/site, a page for each public name
	$(BIN)/mkdocs build --strict

guard: $(VENV)/test.stamp ## time a short subset against the commit before; fails on a loss of 20%
	$(BIN)/python bench/guard.py $(ARGS)

bench: $(VENV)/bench.stamp ## run all benchmarks, in 40 minutes; ARGS="--minutes 90 decode" chooses
	$(BIN)/python -m bench.run $(ARGS)

clean: ## remove the environment, builds and caches
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last: a virtual environment that was interrupted half-way is made again in place.
$(BIN)/pip:
	$(PYTHON) -m venv "$(VENV)"

$(VENV)/%.stamp: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	$(call install,'.[$*]')

$(VENV)/bench.stamp: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	$(call install,'.[bench,peers]')

$(VENV)/demo.stamp: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	$(call install,.)
