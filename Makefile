# make run    train on one machine: CONF=conf/fedavg.toml another experiment, SET='training.lr=0.1 seed=2' other values
# make test   the tests; make test-fast: those that start no process of their own; make test-long: those that take minutes
# make coverage   which lines and branches the tests without Flower's processes reach
# make check  linters and types; make fix: mend what the linter can
# make docs   what is generated, and docs/ as a site in site/
# make bench  the benchmarks
# make watch  a page that shows the runs: http://127.0.0.1:8080
# make ... TORCH=cpu   without CUDA
# make predict RUN=runs/... INPUT=file-or-folder   what a run's model says of it, as CSV
# make notebook   Jupyter on notebooks/
# make stop   end the SuperLink that stays for the next `make run`

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
CONF ?=
SET ?=
RESULTS ?= $(CURDIR)/runs
# PyTorch's build: cpu (without 5 GB of CUDA), cu128, ... or that of the package index; kept for the next make.
TORCH ?= $(shell cat .venv/torch 2>/dev/null)
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)

# Every checkout has a SuperLink of its own, on a port of its own, started in a folder without Python packages: Ray's workers look
# for packages there first, and an older checkout's SuperLink would run the older checkout's programs.
export PATH := $(BIN):$(PATH)
export FLWR_HOME := $(CURDIR)/.flwr
PORT ?= $(shell printf '%s' '$(CURDIR)' | cksum | awk '{ print 20000 + $$1 % 20000 }')
export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT := $(PORT)
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1
# Python keeps its compiled modules, whatever the environment says: torch alone takes 20 seconds to compile.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run watch predict test test-fast test-long coverage check fix docs bench notebook stop
.DEFAULT_GOAL := run

# flwr comes first since it brings the version of uv that it installs each run's packages with: one cache for both.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check 'flwr>=1.41,<2'
	.venv/bin/python -m uv $(if $(TORCH),pip install --torch-backend $(TORCH) -r pyproject.toml,sync) \
		--quiet --group dev --python .venv/bin/python
	@echo '$(TORCH)' > .venv/torch
	@touch $@

# The SuperLink that `flwr run` would start by itself makes a copy of the environment for each run, which costs half a minute; deleting
# it takes more than the five seconds that Flower waits at the end of a run on a slow disk, and the run is then called failed.
run: .venv/installed
	@python -m configuration '$(CONF)' 'results.folder="$(RESULTS)"' '$(SET)' > /dev/null || exit 2
	@mkdir -p $(FLWR_HOME)
	@cd $(FLWR_HOME) && there() { python -c 'import socket; socket.create_connection(("127.0.0.1", $(PORT)), 1)' 2>/dev/null; }; \
	there || { nohup flower-superlink --insecure --simulation --host 127.0.0.1 --port $(PORT) --disable-runtime-dependency-installation \
		--database state.db --log-file superlink.log >/dev/null 2>&1 & \
	for try in $$(seq 120); do there && break; sleep 0.5; done; }
	@# A file and pairs, checked, as the pairs that Flower takes; each site's share of a GPU, 0 on a machine without one.
	@eval "$$(python -m configuration '$(CONF)' 'results.folder="$(RESULTS)"' '$(SET)')" && \
	share=$${GPU_SHARE:-$$(awk "BEGIN { share = $(GPUS) / $$SITES; print (share > 1 ? 1 : int(share * 100) / 100) }")} && \
	python -m deploy.run -- --run-config "$$RUN_CONFIG" \
		--federation-config "num-supernodes=$$SITES client-resources-num-cpus=1 client-resources-num-gpus=$$share"

test: .venv/installed
	python -m pytest --numprocesses 4

coverage: .venv/installed
	python -m pytest --numprocesses 3 -m 'not e2e' --cov --cov-report=term-missing

test-long: .venv/installed
	python -m pytest -m long

test-fast: .venv/installed
	python -m pytest --numprocesses 2 -m 'not e2e and not slow'

docs: .venv/installed
	python -m configuration.generate
	python -m uv pip install --quiet --python .venv/bin/python --group docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo 'site/index.html; with search: .venv/bin/python -m http.server --bind 127.0.0.1 --directory site 8000'

check: .venv/installed
	ruff check . && ruff format --check . && mypy . && lint-imports

fix: .venv/installed
	ruff check --fix . && ruff format .

watch: .venv/installed
	@mkdir -p '$(RESULTS)' && python -m server_app.watch '$(RESULTS)'

predict: .venv/installed
	@python -m simulation.trained '$(RUN)' '$(INPUT)'

notebook: .venv/installed
	python -m uv pip install --quiet jupyterlab && jupyter lab notebooks/compare_strategies.ipynb

bench: .venv/installed
	python -m benchmarks.aggregation && python -m benchmarks.local_training && python -m benchmarks.speed && python -m benchmarks.asynchronous && python -m benchmarks.sealing

stop:
	-pkill -f "[f]lower-superlink.*--port $(PORT)"
	-pkill -f "$(CURDIR)/.venv/.*/[r]ay/"  # where a run was going on
