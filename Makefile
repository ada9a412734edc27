# Needs Python >= 3.11 and make. Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: bench test mutants lint format leaderboard clean

bench: $(INSTALLED)  ## run the quick suite with all agents and print the leaderboard
	$(BIN)/scpo-bench run quick --jobs $(JOBS)
	$(BIN)/scpo-bench leaderboard quick

test: $(INSTALLED)  ## all tests
	$(BIN)/python -m pytest -n $(JOBS)

mutants: $(INSTALLED)  ## break one line at a time: which breaks do the tests notice? (an hour)
	$(BIN)/python tests/mutants.py --jobs $(JOBS)

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check scpo_bench envs baselines tests
	$(BIN)/ruff format --check scpo_bench envs baselines tests
	$(BIN)/mypy -p scpo_bench

leaderboard: $(INSTALLED)  ## generate the tables in README.md and docs/
	$(BIN)/python -m scpo_bench.leaderboard.readme README.md results paper scpo_bench/DoubleIntegratorImitation-v0
	$(BIN)/python -m scpo_bench.leaderboard.readme docs/paper.md results paper
	$(BIN)/python -m scpo_bench.leaderboard.readme docs/scpo_rl.md results scpo-rl
	$(BIN)/python -m scpo_bench.leaderboard.readme docs/leaderboard.md
	$(BIN)/python -m scpo_bench.leaderboard.readme docs/protocol.md agents

format: $(INSTALLED)
	$(BIN)/ruff check --fix scpo_bench envs baselines tests
	$(BIN)/ruff format scpo_bench envs baselines tests

# safety-gymnasium pins versions that fit no current Python; its real needs are among ours.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scpo-bench needs Python >= 3.11; make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps -c constraints.txt safety-gymnasium
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
