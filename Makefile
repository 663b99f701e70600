# make run PROMPT="a red apple"    a picture from the demo model, torch-free
# make test                        the development environment and every quick test
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROMPT ?= a red apple
OUTPUT ?= out/picture.png
RUN := .venv-run
DEV := .venv
NEWEST := .venv-newest
BIN := $(DEV)/bin

.PHONY: run test check format lint types contracts slow wheel-check newest-check demo clean

run: $(RUN)/.ready
	@mkdir -p $(dir $(OUTPUT))
	@$(RUN)/bin/bksdm-run "$(PROMPT)" -o "$(OUTPUT)"

test: $(DEV)/.ready
	$(BIN)/python -m pytest -m "not slow and not gpu"

check: format lint types contracts test

format: $(DEV)/.ready
	$(BIN)/ruff format --check .

lint: $(DEV)/.ready
	$(BIN)/ruff check .

types: $(DEV)/.ready
	$(BIN)/basedpyright

contracts: $(DEV)/.ready
	$(BIN)/lint-imports

slow: $(DEV)/.ready           # full-size graphs, kills, whole trainings: minutes and gigabytes
	$(BIN)/python -m pytest -m slow

wheel-check: $(DEV)/.ready    # what a user installs: the wheel with one extra, in an empty environment
	PYTHON="$(PYTHON)" DEV="$(DEV)" bash .ci/wheel-check

newest-check: $(NEWEST)/.ready   # the newest diffusers and transformers, which exclude Optimum
	$(NEWEST)/bin/python -m pytest -m "not slow and not gpu"

# The runtime's environment: numpy, pillow, tokenizers, onnxruntime; no torch.
$(RUN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet -e ".[cpu]"
	@touch $@

# torch first and by its version, so that no other package picks a build for you.
$(DEV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(NEWEST)/.ready: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet $$(grep '^torch==' constraints-newest.txt)
	$(NEWEST)/bin/python -m pip install --quiet -c constraints-newest.txt -e ".[export,training,evaluation]" pytest hypothesis
	@touch $@

clean:
	rm -rf $(RUN) $(DEV) $(NEWEST) dist build .pytest_cache .ruff_cache
