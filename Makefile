# `make demo` and `make test` are all the set-up there is: like lint, types, docs and sanitize, they make .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OLDEST := .venv-oldest
INSTALLED := $(VENV)/.installed

JOBS ?= 2
RESULTS ?= build/gpu
PART ?= tests

.PHONY: demo test test-oldest lint types docs gpu sanitize clean

demo: $(INSTALLED)  ## the main job on real handwritten digits, offline
	$(BIN)/residual-kernels demo

test: $(INSTALLED) lint  ## everything that guards main
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=15

test-oldest:  ## the tests with the oldest release of every dependency that pyproject.toml allows; best with PYTHON=python3.10
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[test]"
	$(OLDEST)/bin/python -m pytest --durations=15

lint: $(INSTALLED) types  ## mypy, then ruff's checks and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy, with what [tool.mypy] says
	$(BIN)/python -m mypy

gpu:  ## on a machine with a GPU, with any Python that has torch, triton and pytest: PART=tests|host|core|wide|fit|peers|small
	TRITON_INTERPRET=0 $(PYTHON) -m benchmarks.gpu --results $(RESULTS) --part $(PART)

docs: $(INSTALLED)  ## the documentation site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

sanitize: $(INSTALLED)  ## the operator tests on every instruction set, emulated, under ASan and UBSan (about 2 minutes)
	RESIDUAL_KERNELS_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	EXTENSION_UNDER_TEST=build/sanitize LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/pytest -q -o pythonpath="tests build/sanitize/lib" tests/test_cpp_backend.py tests/test_spectral_sum.py tests/test_operator_entrances.py -k "not 1792 and not opcheck"

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:  ## removes the environments and everything that was built
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info residual_kernels/*.so
