# Two commands do all set-up: `make demo` and `make test`. PYTHON picks the interpreter of the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: install demo test lint types format clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.installed  ## make the environment: everything, editable

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing PyTorch and the rest into $(VENV): about 5.5 GB, a few minutes.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	touch $@

demo: install  ## pretrain on a small generated image set; k-NN figures and pictures in runs/demo
	$(BIN)/fastdino demo --output_dir $(DEMO)

test: install  ## run the tests, two at a time, each on one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 8

lint: install  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy, strict
	$(BIN)/mypy

format: install  ## rewrite the files as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and what runs left
	rm -rf $(VENV) runs build dist *.egg-info
