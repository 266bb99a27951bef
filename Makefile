# Two commands do all set-up: `make demo` and `make test`. PYTHON picks the interpreter of the environment.
# `make gpu-report` sets up nothing: it takes PYTHON as it is, with its torch, triton and pytest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
BENCH ?= runs/bench

.PHONY: install demo test lint types format bench gates gpu-report clean help

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

bench: install  ## the kernels' benchmarks: tables, and JSON in BENCH (QUICK=1: small sizes)
	mkdir -p $(BENCH)
	$(BIN)/python -m pytest -q benchmarks --benchmark-quiet --benchmark-json=$(BENCH)/raw.json $(if $(QUICK),--quick); \
	status=$$?; $(BIN)/python -m benchmarks.report $(BENCH)/raw.json --write $(BENCH) && exit $$status

gates: install  ## compile every kernel ahead of time, with no GPU; the table in benchmarks/results
	PYTHONPATH=kernels:. $(BIN)/python -m benchmarks.gpu.compile_gates --write benchmarks/results

gpu-report:  ## on a GPU: tests, benchmarks, one report in benchmarks/results (MORE=1: the second; REDUCED=1: on the CPU)
	PYTHONPATH=kernels:. $(PYTHON) -m benchmarks.gpu.gpu_report $(if $(MORE),--more) $(if $(REDUCED),--reduced) $(if $(OUTPUT),--output $(OUTPUT))

clean:  ## remove the environment and what runs left
	rm -rf $(VENV) runs build dist *.egg-info
