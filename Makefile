# Every target installs what it needs into VENV with the interpreter PYTHON, except gpu-report, which uses
# PYTHON with the torch, triton and pytest already installed there, and gates with GATES_PYTHON.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
BENCH ?= runs/bench
HUB ?= runs/hub

.PHONY: install demo test test-slow test-slurm mutants lint types docs format bench gates gpu-report hub clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.installed  ## create the environment: all extras, editable

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing PyTorch and the rest into $(VENV): about 5.5 GB, a few minutes.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	touch $@

demo: install  ## pretrain on a small generated image set; k-NN accuracies and pictures in runs/demo
	$(BIN)/fastdino demo --output_dir $(DEMO)

test: install  ## run all tests in two processes, each with one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 8

test-slow: install  ## run the tests marked slow: the full form of what `make test` runs reduced
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

test-slurm: install  ## as root: install Slurm, start two nodes on this machine, and run the tests marked slurm
	@if tests/slurm/install.sh; then OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -m slurm tests/slurm; fi

mutants: install  ## put small faults into the code and count those that the tests notice (slow; continues where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --write benchmarks/results/mutants.md

test-originals: $(if $(ORIGINALS_PYTHON),,install)  ## run other repositories' tests of their losses with ours (ORIGINALS=folder of checkouts; ORIGINALS_PYTHON=python: another environment)
	PYTHONPATH=.:kernels:$$PYTHONPATH $(or $(ORIGINALS_PYTHON),$(BIN)/python) -m tests.original_suites $(if $(ORIGINALS),--checkouts $(ORIGINALS))

lint: install  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy, strict
	$(BIN)/mypy

docs: install  ## build the documentation site in runs/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: install  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## benchmark the kernels; tables and JSON in BENCH (QUICK=1: small sizes)
	mkdir -p $(BENCH)
	$(BIN)/python -m pytest -q benchmarks --benchmark-quiet --benchmark-json=$(BENCH)/raw.json $(if $(QUICK),--quick); \
	status=$$?; $(BIN)/python -m benchmarks.kernel_tables $(BENCH)/raw.json --write $(BENCH) && exit $$status

gates: $(if $(GATES_PYTHON),,install)  ## compile every kernel ahead of time, without a GPU (GATES_PYTHON=python: another torch and triton)
	PYTHONPATH=kernels:. $(or $(GATES_PYTHON),$(BIN)/python) -m benchmarks.gpu.compile_gates --write benchmarks/results

gpu-report:  ## on a GPU: one report in benchmarks/results (MORE=1: the second; REDUCED=1: on a CPU; REHEARSE=1: its time budget)
ifdef REHEARSE
	PYTHONPATH=kernels:.:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu.rehearsal --write $(or $(OUTPUT),benchmarks/results)
else
	PYTHONPATH=kernels:.:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu.gpu_report $(if $(MORE),--more) $(if $(REDUCED),--reduced) $(if $(OUTPUT),--output $(OUTPUT))
endif

hub:  ## write the kernels in the format of Hugging Face's kernel Hub into HUB
	$(PYTHON) kernels/build_hub.py --output $(HUB)

clean:  ## remove the environment, runs and build outputs
	rm -rf $(VENV) runs build dist *.egg-info
