# Everything happens in .venv; a second run of any target installs nothing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    := samples/out
DEVICE ?= cpu
LOWEST := .venv-lowest

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
# With LAUNCH="torchrun --nproc-per-node 2 -m" two processes share the laboratory's work.
LAUNCH ?= $(BIN)/python -m
LAB    := $(LAUNCH) guidancekit bench --models scenes-unet,scenes-flow --captions 32 --seeds 4 --steps 20
METHODS := apg,cfg++,fdg,interval,adaptive,beta-cfg,cads,cfg-zero*,dynamic-thresholding,icg,mambo-g,rectified-cfg++,rescaled-cfg,tcfg

.PHONY: help demo app bench lab test test-browser lint format compatibility methods test-lowest clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
		awk -F'|' '{ printf "  make %-13s %s\n", $$1, $$2 }'

# The stamps are touched last, so an installation that broke off is repeated.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV), once; torch is large, so this takes a while ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,browser]'
	@command -v chromium chromium-browser google-chrome > /dev/null || { \
		echo "installing Debian's chromium ..."; \
		SUDO=$$(command -v sudo || true); \
		$$SUDO apt-get update -qq && $$SUDO apt-get install -qq --no-install-recommends chromium > /dev/null; }
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,bench]'
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	@echo "installing the oldest versions into $(LOWEST), once ..."
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed ## draw the comparison grid: four prompts under five methods
	$(BIN)/guidancekit compare \
		"a large red circle on a white background" \
		"a blue star above a yellow square" \
		"a small striped orange moon on a navy background" \
		"a green heart left of a purple ring" \
		--methods cfg,apg,cfg++,fdg,interval --scales 10 --seeds 0 --out $(OUT)/demo.png

app: $(VENV)/.installed ## compare methods in the browser
	$(BIN)/guidancekit app

bench: $(VENV)/.installed-bench ## measure what guidance costs, into BENCHMARKS.md; DEVICE=cuda
	$(BIN)/python -m benchmarks --device $(DEVICE)

lab: $(VENV)/.installed-dev ## the laboratory's report, samples/lab: over an hour on two cores; LAUNCH=...
	$(LAB) --out samples/lab --methods cfg,apg,cfg++,fdg,interval,cads,rescaled-cfg,cfg-mp,rectified-cfg++ --scales 2,4,6,10
	$(LAB) --out samples/lab --methods '$(METHODS)' --match effective-scale --at 6
	$(LAB) --out samples/lab --claims
	$(LAB) --out samples/lab/again --claims apg,interval,cfg++,cads --first-seed 1000 \
		--against samples/lab/claims.json
	$(LAB) --out samples/lab --mixture --scales 2,4,8

test: $(VENV)/.installed-dev ## ruff, mypy and pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile

test-browser: $(VENV)/.installed-browser ## the app in a real browser; installs one where there is none
	$(BIN)/pytest tests/browser

lint: $(VENV)/.installed-dev ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compatibility: $(VENV)/.installed-dev ## write the README's tables of what works with what
	$(BIN)/python -m tests.compatibility --write README.md

methods: $(VENV)/.installed-dev ## write the README's table of methods
	$(BIN)/python -m tests.compatibility --methods --write README.md

test-lowest: $(LOWEST)/.installed ## pytest with the oldest versions that pyproject.toml allows
	$(LOWEST)/bin/pytest

clean: ## remove the environments, the caches and the demo
	rm -rf $(VENV) $(LOWEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(OUT)/demo.png $(OUT)/demo.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
