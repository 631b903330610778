# Needs python3 (3.10 or newer) with venv, make, and a C compiler. Everything else comes into .venv and .tools.
PYTHON ?= python3
# The engine of `make demo`. Their requirements clash, so each has an environment.
ENGINE ?= vllm
BIN := .venv/bin
SGLANG_BIN := .venv-sglang/bin
# The newest of what is served has two more environments, and `make test-releases` one after the other.
NEWEST_BIN := .venv-newest/bin
SGLANG_NEWEST_BIN := .venv-sglang-newest/bin
# Real clients and agents, in front of the server of the ENGINE.
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.ready
UV := .tools/bin/uv
READY := .venv/.ready
SGLANG_READY := .venv-sglang/.ready
NEWEST_READY := .venv-newest/.ready
SGLANG_NEWEST_READY := .venv-sglang-newest/.ready
# Of an engine's record: the release that every test has passed on, and the newest that is served.
record = $(shell $(PYTHON) -c 'from dsv32_plugin.engines import ENGINES; print(ENGINES["$(1)"].$(2))')
TYPED := build/typed
PYTEST_OPTIONS ?=

# Threads that wait do not take a core from those that work.
export OMP_WAIT_POLICY ?= PASSIVE
# An engine's server is three processes of thousands of modules: compiled each time, they take half of its start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo check test test-fast test-vllm test-sglang test-wide test-newest test-vllm-newest test-sglang-newest test-releases test-clients lint wheel clean

help:
	@echo "make demo    serve the trained tiny model with vLLM, or ENGINE=sglang, and ask it"
	@echo "make check   lint, types and the fast tests, before a commit: three minutes"
	@echo "make test    lint, types and tests, with the release of each engine that its record names to install"
	@echo "make test-vllm, make test-sglang   the tests with one engine"
	@echo "make test-wide   what make test leaves out: servers for more combinations of options, with both engines"
	@echo "make test-newest     what a release can break, with the newest release of each engine; NEWEST=tests for all"
	@echo "make test-releases   surface and demo of every release of each engine, installed one after the other"
	@echo "make lint    ruff and mypy"
	@echo "make wheel   build the wheel, into dist/"
	@echo "make clean   remove what these made, the environments included"
	@echo "make test-clients       real clients in front of a server of vLLM, or ENGINE=sglang; needs npm"

ifeq ($(ENGINE),sglang)
demo: $(SGLANG_READY)
	$(SGLANG_BIN)/dsv32 demo --engine sglang
else
demo: $(READY)
	$(BIN)/dsv32 demo --engine $(ENGINE)
endif

# Lint and tests at once, a process for each core. What imports an engine, compiles or interprets kernels, runs models or
# waits is left to `make test`, as are more than a few of the examples that Hypothesis makes up.
SLOW := tests/engine tests/kernels/test_aot.py tests/kernels/test_ahead.py tests/kernels/test_*_triton.py \
	tests/test_vllm_*.py tests/test_tiny.py tests/training/test_asset.py tests/training/test_trainer.py \
	tests/benchmarks/test_measurement.py tests/test_search_agent.py
FAST := --numprocesses=2 --dist=loadfile --hypothesis-profile=check
check: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target lint test-fast

test-fast: $(READY)
	$(BIN)/python -m pytest -q $(FAST) -m "not engine and not gpu and not index" $(SLOW:%=--ignore-glob='%') $(PYTEST_OPTIONS)

# Both engines at once: most of the time a test waits for a server to start.
test: lint $(SGLANG_READY)
	@echo "The tests with vLLM and with SGLang run at once, for most of an hour on two cores; what they print comes when they end."
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-vllm test-sglang

WITHOUT_ENGINE := tests/parsers tests/training
# Where tests are that an engine runs; to look through all others takes as long as to start a server.
WITH_ENGINE := tests/clients tests/engine $(wildcard tests/test_*.py)
test-vllm: $(READY)
	$(BIN)/python -m pytest -m "not index and not wide" $(WITHOUT_ENGINE:%=--ignore=%) $(PYTEST_OPTIONS)

# The shorter of the two has what only one needs to do.
test-sglang: $(SGLANG_READY)
	$(SGLANG_BIN)/python -m pytest $(WITHOUT_ENGINE) $(PYTEST_OPTIONS)
	$(SGLANG_BIN)/python -m pytest -m "(engine or upstream or index) and not wide" $(WITH_ENGINE) $(PYTEST_OPTIONS)

test-wide: $(READY) $(SGLANG_READY)
	$(BIN)/python -m pytest -m wide $(PYTEST_OPTIONS)
	$(SGLANG_BIN)/python -m pytest -m wide $(PYTEST_OPTIONS)

# What depends on the engine's release, in minutes: the names and hooks, start-up and what is refused, a chat with tools
# through the real server, and tokens and log-probabilities of batches as Hugging Face has them; with vLLM also the
# kernels, by the newest Triton.
NEWEST := tests/test_upstream.py tests/test_doctor.py tests/test_demo.py tests/engine/test_bad_input.py \
	tests/engine/test_parity.py::test_concurrent_chunked_and_mixed_batches
VLLM_NEWEST := $(NEWEST) $(if $(filter tests,$(NEWEST)),,tests/test_vllm_chat_hooks.py tests/kernels/test_aot.py)
SGLANG_NEWEST := $(NEWEST) $(if $(filter tests,$(NEWEST)),,tests/test_sglang_chat_hooks.py)
test-newest: $(NEWEST_READY) $(SGLANG_NEWEST_READY)
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-vllm-newest test-sglang-newest

test-vllm-newest: $(NEWEST_READY)
	DSV32_AOT_SHARE=16 $(NEWEST_BIN)/python -m pytest $(VLLM_NEWEST) $(PYTEST_OPTIONS)

test-sglang-newest: $(SGLANG_NEWEST_READY)
	$(SGLANG_NEWEST_BIN)/python -m pytest -m "engine or upstream" $(SGLANG_NEWEST) $(PYTEST_OPTIONS)

test-releases: | $(UV)
	$(PYTHON) tools/releases.py $(ENGINES)

ifeq ($(ENGINE),sglang)
test-clients: ENGINE_BIN := $(SGLANG_BIN)
test-clients: $(SGLANG_READY)
else
test-clients: ENGINE_BIN := $(BIN)
test-clients: $(READY)
endif
test-clients: $(CLIENTS_READY)
	PATH="$(CURDIR)/$(CLIENTS)/agents/node_modules/.bin:$$PATH" $(ENGINE_BIN)/python tests/clients/serve.py \
		$(CLIENTS)/bin/python -m pytest -c tests/clients/live/pytest.ini tests/clients/live $(PYTEST_OPTIONS)

# The folders of the checkout map into one package, so types are checked as installed.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build
	@$(UV) pip install --quiet --no-deps --reinstall-package dsv32-plugin --python $(BIN)/python --target $(TYPED) .
	cd $(TYPED) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

# setuptools would put what an older build/ still holds into the wheel.
wheel: | $(UV)
	@rm -rf build dist
	$(UV) build --quiet --wheel
	@ls dist/*.whl

clean:
	rm -rf .venv .venv-sglang .venv-newest .venv-sglang-newest .venv-release $(CLIENTS) .tools build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The extras take the newest there is.
$(READY): WANTED = -e ".[vllm,dev]" vllm==$(call record,vllm,install)
$(SGLANG_READY): WANTED = -e ".[sglang,dev]" sglang==$(call record,sglang,install)
$(NEWEST_READY): WANTED = -e ".[vllm,dev]" vllm==$(call record,vllm,releases[-1].name)
$(SGLANG_NEWEST_READY): WANTED = -e ".[sglang,dev]" sglang==$(call record,sglang,releases[-1].name)
$(READY) $(SGLANG_READY) $(NEWEST_READY) $(SGLANG_NEWEST_READY): pyproject.toml dsv32_plugin/engines.py | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(@D)
	$(UV) pip install --python $(@D)/bin/python $(WANTED)
	@touch $@

$(CLIENTS_READY): WANTED := tests/clients/requirements.txt
$(CLIENTS_READY): tests/clients/requirements.txt tests/clients/package.json | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(CLIENTS)
	$(UV) pip install --python $(CLIENTS)/bin/python --requirement $(WANTED) --override $(WANTED)
	mkdir -p $(CLIENTS)/agents
	cp tests/clients/package.json $(CLIENTS)/agents
	npm install --prefix $(CLIENTS)/agents --no-audit --no-fund
	@touch $@

$(UV):
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) lacks venv; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet uv
