# Each target first sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
BUILT := impure_fast/_build.json
EXTRAS := cli,timm,hub,demo,app,attack,perceptual,evaluate,art,train,bench,onnx,serve,docs,dev
BUILD_TOOLS := setuptools wheel ninja pybind11

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-wheel newcomer lint docs linkcheck bench clean constraints

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(BUILT) ## install the package, editable, with all extras into .venv

# pip builds this package before it installs torch, so the native parts come after.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv) or set PYTHON=."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip $(BUILD_TOOLS)
	IMPURE_FAST_BUILD=none $(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

# Again where a native source is newer.
$(BUILT): $(STAMP) $(shell find csrc -type f)
	$(BIN)/python setup.py build_ext --inplace
	touch $@

demo: $(BUILT) ## attack a classifier and defend it: demo.json, demo.png
	$(BIN)/impure-fast demo --json demo.json --output demo.png

test: $(BUILT) ## run the tests
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

test-slow: $(BUILT) ## run the slow tests
	$(BIN)/python -m pytest -q -m slow

# One compiled library serves every torch from 2.11: it is built with the newest and tested with the oldest (whose
# Triton interprets with numpy up to 2.2 alone).
test-wheel: $(STAMP) ## build sdist and wheel, test the wheel outside the tree on the oldest torch
	rm -rf build/dist build/away
	$(BIN)/python -m build --no-isolation --outdir build/dist .
	$(BIN)/python -m twine check --strict build/dist/*
	test -x build/oldest/bin/python || $(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --upgrade pip
	build/oldest/bin/python -m pip install --quiet "torch==2.11.*" "numpy<2.3" pytest pytest-xdist build/dist/*.whl
	build/oldest/bin/python -m pip install --quiet --force-reinstall --no-deps build/dist/*.whl
	mkdir build/away && cp -r tests build/away
	cd build/away && ../oldest/bin/python -m pytest -q -n 2 --dist loadfile tests/ops tests/golden tests/test_engine.py

newcomer: $(STAMP) ## time a newcomer's way, from pip install of the wheel to a purified picture
	rm -rf build/newcomer
	IMPURE_FAST_BUILD=none $(BIN)/python -m build --no-isolation --outdir build/newcomer .
	$(BIN)/python -m benchmarks.newcomer build/newcomer/*.whl \
		"$$($(BIN)/python -c 'import skimage; print(*skimage.__path__)')/data/chelsea.png" --json build/newcomer/newcomer.json

# The type checker cannot see that kernels/ is installed as impure_fast.kernels, so it reads a tree of links.
lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null | xargs -r $(BIN)/clang-format --dry-run --Werror
	rm -rf build/types && mkdir -p build/types/impure_fast
	ln -s $(CURDIR)/impure_fast/* $(CURDIR)/kernels build/types/impure_fast/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p impure_fast

docs: $(STAMP) ## build the site into build/docs; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs

linkcheck: $(STAMP) ## ask for every outside link of the site; needs a network
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees -b linkcheck docs build/linkcheck

bench: $(BUILT) ## run the benchmarks
	$(BIN)/python -m benchmarks run

clean: ## remove what was built; the next target sets up again
	rm -rf build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache demo.json demo.png
	rm -f $(STAMP) impure_fast/_build.json impure_fast/*.so
	find impure_fast kernels tests -name __pycache__ -prune -exec rm -rf {} +

# CUDA's packages and triton follow torch by its own pins, so they are left out.
define PIN
import json, re, sys
for item in sorted(json.load(sys.stdin)["install"], key=lambda item: item["metadata"]["name"].lower()):
    meta = item["metadata"]
    if not re.match(r"(nvidia|cuda|triton|impure.fast)\b", meta["name"]):
        oldest = re.search(r">=\s*3\.(\d+)", meta.get("requires_python", ""))
        marker = f'; python_version >= "3.{oldest[1]}"' if oldest and int(oldest[1]) > 10 else ""
        print(f"{meta['name']}=={meta['version']}{marker}")
endef
export PIN
constraints: ## renew constraints.txt: what the resolver picks today
	$(PYTHON) -m venv --clear build/renew
	build/renew/bin/python -m pip install --quiet --upgrade pip
	build/renew/bin/python -m pip install --quiet --dry-run --ignore-installed --report build/renew/report.json \
		pip $(BUILD_TOOLS) ".[$(EXTRAS)]"
	{ head -n 3 constraints.txt; $(PYTHON) -c "$$PIN" < build/renew/report.json; } > build/renew/constraints.txt
	mv build/renew/constraints.txt constraints.txt
