# `make demo` and `make test` do all the set-up they need; so do the others.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT := out/demo
DATA := data/demo
FLEET := data/fleets/demo.yaml
RATE := 1.0

.PHONY: demo test lint bench clean

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(READY)
	$(BIN)/almanac train --traces $(DATA)/traces --workflows $(DATA)/research.json --fleet $(FLEET) --out $(OUT)/models
	$(BIN)/almanac plan --workflow $(DATA)/research.json --fleet $(FLEET) --estimates $(OUT)/models/estimates.json \
		--rate $(RATE) --time-limit 8 --out $(OUT)/plan.json --table $(OUT)/planned-table.json
	$(BIN)/almanac run --fleet $(FLEET) --truth $(DATA)/truth.json --estimates $(OUT)/models/estimates.json \
		--table $(OUT)/planned-table.json --rate $(RATE) --out $(OUT)
	$(BIN)/almanac report $(OUT)
	@echo "Open $(OUT)/report.html"

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python tests/benchmarks/bench_dispatch.py
	$(BIN)/python tests/benchmarks/bench_runtime.py
	$(BIN)/almanac study --smoke --no-resume --json --out out/study-smoke

clean:
	rm -rf $(VENV) out build dist *.egg-info
