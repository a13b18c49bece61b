# Python 3.11, make and git are enough: `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo demo-slides demo-train test check chaos bench clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m demo

demo-slides: setup
	$(BIN)/python -m demo.slides

demo-train: setup
	$(BIN)/python -m demo.train

test: setup
	$(BIN)/python -m pytest -m "not chaos and not gpu"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

chaos: setup
	$(BIN)/python -m pytest -m chaos

bench: setup
	$(BIN)/python -m benchmarks.rerun
	$(BIN)/python -m benchmarks.embed_throughput
	$(BIN)/python -m benchmarks.text_order
	$(BIN)/python -m benchmarks.gradcache
	$(BIN)/python -m benchmarks.instructions
	$(BIN)/python -m benchmarks.train_emoji
	$(BIN)/python -m benchmarks.train_vqa
	$(BIN)/python -m benchmarks.ablations
	$(BIN)/python -m benchmarks.slide_reading
	$(BIN)/python -m benchmarks.slides_rerun
	$(BIN)/python -m benchmarks.faults

clean:
	rm -rf .venv demo/assets demo/output
