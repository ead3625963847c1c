# Everything a person runs on this repository. `make` alone lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs
# A GPU machine may have its own torch and no package registry: its python3 then runs this checkout as it is.
GPU_PY := $(if $(wildcard $(PY)),$(PY),PYTHONPATH=. python3)

# Nothing here needs a model hub: tests and demo build their own models.
test test-slow demo compare sweep: export HF_HUB_OFFLINE = 1
test test-slow demo bench-cpu bench-adapters bench-serve compare: export TOKENIZERS_PARALLELISM = false
# Where other work shares the cores, threads that spin while they wait make a step several times slower.
demo compare: export OMP_WAIT_POLICY = passive

.DEFAULT_GOAL := help
.PHONY: help setup lint types docs wheel test test-slow gpu-test gpu-sanitize gpu-bench demo bench-cpu bench-adapters bench-serve compare sweep clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: $(STAMP)  ## create .venv with the tested set of packages (constraints.txt)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile -c constraints.txt -e ".[test,bench,serve]"
	touch $@

lint: $(STAMP)  ## rules and format of the source (ruff)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)  ## types of the public API and the values (mypy)
	$(VENV)/bin/mypy

# The site's own packages come with its first build, and not with `make setup`.
$(DOCS): $(STAMP)
	$(PY) -m pip install --quiet --no-compile -c constraints.txt -e ".[docs]"
	touch $@

docs: $(DOCS)  ## build the documentation into build/docs (its search needs a server: python3 -m http.server -d build/docs)
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m mkdocs build --quiet --strict
	$(PY) .ci/check_site.py build/docs

# From another folder, so that it is the wheel's files that are imported.
wheel: $(STAMP)  ## build the wheel, and import every module of it from a folder of its own
	rm -rf build dist
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PY) -m pip install --quiet --no-deps --no-compile --target build/installed dist/*.whl
	cd build && PYTHONPATH=installed "$(CURDIR)/$(PY)" ../.ci/import_all.py installed

test: $(STAMP)  ## the test suite, on two cores
	$(PY) -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## the sweeps that take minutes, too
	$(PY) -m pytest -n 2 --dist loadfile -m "not gpu"

gpu-test:  ## the tests that need a CUDA GPU (with python3 where there is no .venv)
	$(GPU_PY) -m pytest -m gpu

gpu-sanitize:  ## the kernels' tests under CUDA's compute-sanitizer
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes all --error-exitcode 1 \
		env $(GPU_PY) -m pytest -m gpu tests/test_kernels.py

gpu-bench:  ## step times and peak memory on a GPU (under 10 minutes; writes benchmarks/results/gpu.json, gpu_kernels.json)
	$(GPU_PY) benchmarks/gpu.py
	$(GPU_PY) benchmarks/gpu_kernels.py

demo: $(STAMP)  ## pretrain, fine-tune, export and compare a small model (minutes; writes demo/)
	$(VENV)/bin/s2ft demo

bench-cpu: $(STAMP)  ## step times and memory against LoRA and full fine-tuning (writes benchmarks/results/cpu.json)
	$(PY) benchmarks/cpu.py

bench-adapters: $(STAMP)  ## switching, batches, files and merging of adapters (writes benchmarks/results/adapters.json)
	$(PY) benchmarks/adapters.py

# Runs that are in build/compare-default.jsonl are not run again.
compare: $(STAMP)  ## quality: S²FT, LoRA and others, each at its best rate, by what they learn and forget (resumes)
	mkdir -p build
	$(PY) -W ignore benchmarks/compare/run.py --rows build/compare-default.jsonl
	$(PY) benchmarks/compare/report.py build/compare-default.jsonl --figure build/compare.svg

bench-serve: $(STAMP)  ## the server under load, against the base model alone (writes benchmarks/results/serve.json)
	$(PY) benchmarks/serve.py

sweep: $(STAMP)  ## every model type of transformers, other libraries where they are (writes benchmarks/results/{sweep,zoo}.json)
	$(PY) benchmarks/sweep/run.py --mapping all

clean:  ## remove .venv, demo/ and caches
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
