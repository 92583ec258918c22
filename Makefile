# make projector  sets up and runs the main job on the embedded `tiny` preset
# make test       sets up and runs lint, types and tests
PYTHON ?= python3
PRESET ?= tiny
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PORT ?= 5000

export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(BIN):$(PATH)

.PHONY: projector photos test lint types tests ui status clean

projector: $(VENV)/ready
	mlflow run . -e projector --env-manager local --experiment-name mmphi -P preset=$(PRESET) $(ARGS)
	@echo "look at it: make ui"

photos: $(VENV)/ready  ## real photographs: make photos PHOTOS=folder MODELS=folder
	MMPHI_PHOTOS="$(abspath $(PHOTOS))" MMPHI_MODELS="$(abspath $(MODELS))" \
	mlflow run . -e projector --env-manager local --experiment-name mmphi -P preset=photos $(ARGS)

test: lint types tests

lint: $(VENV)/ready
	ruff check .
	ruff format --check .

types: $(VENV)/ready
	mypy

tests: $(VENV)/ready
	pytest

ui: $(VENV)/ready
	mlflow ui --backend-store-uri $(MLFLOW_TRACKING_URI) --host 127.0.0.1 --port $(PORT)

status: $(VENV)/ready
	mmphi status --preset $(PRESET)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmphi needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
