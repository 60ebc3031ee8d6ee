# make demo   grow a small model on this machine, in minutes, and open its page by the path that is printed
# make test   lint, types, floors and tests
# make faults  what a run is promised to survive, done to it and counted; writes docs/reliability.md
# They make .venv and install what they need, once per change of pyproject.toml.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= 2.13.0

.PHONY: demo test lint faults clean

# Exit code 10: the budget was spent, and the model and its page are there.
demo: $(VENV)/.installed
	$(BIN)/espalier demo || [ $$? -eq 10 ]

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

faults: $(VENV)/.installed-dev
	$(BIN)/python -m faults

clean:
	rm -rf $(VENV) runs

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@sh tools/install-torch.sh $(BIN)/python $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed
