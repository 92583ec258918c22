# make projector                           the main job on the embedded data (PRESET=tiny, ARGS='-P layers=3')
# make photos PHOTOS=folder                projector and adapter on captioned photographs, as experiments/photos.yaml
#                                          says; the three pretrained models are fetched, or lie in MODELS=folder
# make status | ui                         what is built; MLflow's pages
# make test                                lint, types and tests
# make harness                             the model class that lmms-eval asks, in an environment that has lmms-eval
# make cloud                               the tasks for clouds, run here; with SkyPilot, which has an environment of its own
# Each sets up .venv first, anew when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
PRESET ?= tiny
VENV := .venv
SKY := .sky
LMMS := .lmms
BIN := $(CURDIR)/$(VENV)/bin
PORT ?= 5000
MODELS ?= $(CURDIR)/models

EXPERIMENT ?= mmphi
RUN := $(BIN)/mlflow run . --env-manager local --experiment-name $(EXPERIMENT)

export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(BIN):$(PATH)

.PHONY: projector photos test cloud harness lint types tests ui status clean

projector: $(VENV)/ready
	$(RUN) -e projector -P preset=$(PRESET) $(ARGS)
	@echo "make ui shows it"

photos: $(VENV)/ready
	@test -f "$(PHOTOS)/captions.csv" -a -d "$(PHOTOS)/images" || { \
	  echo "say where your photographs are: make photos PHOTOS=folder"; \
	  echo "the folder holds images/ and captions.csv, which begins with the line image,caption"; exit 2; }
	$(BIN)/mmphi fetch models "$(MODELS)"
	MMPHI_PHOTOS="$(abspath $(PHOTOS))" MMPHI_MODELS="$(abspath $(MODELS))" $(RUN) -e qlora -P preset=photos $(ARGS)
	@echo "make ui shows it"

test: lint types tests

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

# Two at once, and the processes that they start: one thread each, or they wait for one another.
tests: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

cloud: $(VENV)/ready $(SKY)/tried
	test ! -f $(SKY)/ready || export MMPHI_SKY="$(CURDIR)/$(SKY)/bin/python"; $(BIN)/pytest -m cloud tests/test_cloud.py

$(SKY)/tried:
	$(PYTHON) -m venv $(SKY)
	$(SKY)/bin/python -m pip install --quiet 'skypilot>=0.14' && touch $(SKY)/ready || \
	  echo "SkyPilot could not be installed: its parser does not read the tasks here"
	touch $@

harness: $(VENV)/ready $(LMMS)/tried
	test ! -f $(LMMS)/ready || export MMPHI_LMMS="$(CURDIR)/$(LMMS)/bin/python"; $(BIN)/pytest -m harness tests/test_harness.py

# Beside what mmphi has, and before it where the two want other versions.
$(LMMS)/tried: $(VENV)/ready
	$(BIN)/python -m venv $(LMMS)
	$(BIN)/python -c 'import sysconfig; p = sysconfig.get_path("purelib"); print(f"import site; site.addsitedir({p!r})")' \
	  > "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mmphi.pth"
	grep -v '^av==' constraints.txt > $(LMMS)/constraints.txt
	$(LMMS)/bin/python -m pip install --quiet --constraint $(LMMS)/constraints.txt 'lmms-eval>=0.7' && touch $(LMMS)/ready || \
	  echo "lmms-eval could not be installed: what it runs here is not tested"
	touch $@

ui: $(VENV)/ready
	$(BIN)/mmphi ui --port $(PORT)

status: $(VENV)/ready
	$(BIN)/mmphi status --preset $(PRESET)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmphi needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LMMS) .mypy_cache .ruff_cache .pytest_cache
