# make projector                           the main job on the embedded data (PRESET=tiny, ARGS='-P layers=3')
# make photos PHOTOS=folder                projector and adapter on captioned photographs, as experiments/photos.yaml
#                                          says; the three pretrained models are fetched, or are in MODELS=folder
# make status | ui                         which stages are built; MLflow's pages
# make test                                lint, types and the default tests: 8.5 minutes on 2 cores
# make test-all                            all tests: the default ones, then test-slow, real, cloud and harness
# make test-slow                           tests that take long, or need Chromium, PostgreSQL, espeak-ng or a Ray cluster
# make real                                tests with pretrained models, in the folders that MMPHI_MODELS, MMPHI_PHOTOS
#                                          and MMPHI_REAL name
# make harness                             the model class for lmms-eval, in an environment that has lmms-eval
# make docs                                the documentation as a site in site/; MkDocs has an environment of its own
# make cloud                               the tasks for clouds, run here; with SkyPilot, which has an environment of its own
# Each creates .venv first, and again when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
PRESET ?= tiny
VENV := .venv
SKY := .sky
LMMS := .lmms
DOCS := .docs
BIN := $(CURDIR)/$(VENV)/bin
PORT ?= 5000
MODELS ?= $(CURDIR)/models

EXPERIMENT ?= mmphi
RUN := $(BIN)/mlflow run . --env-manager local --experiment-name $(EXPERIMENT)

export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(BIN):$(PATH)
# uv compiles nothing: the first import does, and has to be able to store it, or every process takes 17 s longer.
unexport PYTHONDONTWRITEBYTECODE

# Installs with uv, which pip installs into the environment first; with pip where uv cannot be used.
# $(1): folder of the environment; $(2): arguments of `pip install`.
define install
$(1)/bin/python -m pip install --quiet --constraint constraints.txt uv \
  && $(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) \
  || { echo "uv did not install the packages: pip does, which takes some minutes"; \
       $(1)/bin/python -m pip install --quiet $(2); }
endef

.PHONY: projector photos test test-all test-slow real cloud harness docs lint types tests ui status clean

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

# One after the other, also under `make -j`.
test-all:
	$(MAKE) test
	$(MAKE) test-slow
	$(MAKE) real
	$(MAKE) cloud
	$(MAKE) harness

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Its workers may not be there in time on a busy machine, which is exit status 2: without them it takes longer.
types: $(VENV)/ready
	$(BIN)/mypy || { test $$? = 2 && $(BIN)/mypy --num-workers 0; }

# One thread each, so that they do not compete for the cores; one more than two cores need, because tests also wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

tests: $(VENV)/ready
	$(PYTEST)

test-slow: $(VENV)/ready
	$(PYTEST) -rs -m 'slow or browser or database or speech or cluster'

real: $(VENV)/ready
	$(PYTEST) -m real -rs

cloud: $(VENV)/ready
	$(MAKE) $(SKY)/ready || echo "SkyPilot could not be installed: its parser does not read the tasks here"
	test ! -f $(SKY)/ready || export MMPHI_SKY="$(CURDIR)/$(SKY)/bin/python"; $(BIN)/pytest -rs -m cloud tests/test_cloud.py

$(SKY)/ready: $(VENV)/ready
	rm -f $@
	$(PYTHON) -m venv $(SKY)
	$(call install,$(SKY),'skypilot>=0.14')
	touch $@

harness: $(VENV)/ready
	$(MAKE) $(LMMS)/ready || echo "lmms-eval could not be installed: what it runs here is not tested"
	test ! -f $(LMMS)/ready || export MMPHI_LMMS="$(CURDIR)/$(LMMS)/bin/python"; $(BIN)/pytest -rs -m harness tests/test_harness.py

# Beside what mmphi has, and before it where the two want other versions.
$(LMMS)/ready: $(VENV)/ready
	rm -f $@
	$(BIN)/python -m venv $(LMMS)
	$(BIN)/python -c 'import sysconfig; p = sysconfig.get_path("purelib"); print(f"import site; site.addsitedir({p!r})")' \
	  > "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mmphi.pth"
	grep -v '^av==' constraints.txt > $(LMMS)/constraints.txt
	$(call install,$(LMMS),--constraint $(LMMS)/constraints.txt 'lmms-eval>=0.7')
	touch $@

# The generated pages need mmphi; MkDocs reads its source and imports nothing of it. The variable turns off a notice that
# Material for MkDocs reaches its end of life on 2027-05-05.
docs: $(VENV)/ready $(DOCS)/ready
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  > $(DOCS)/requirements.txt
	@$(call install,$(DOCS),--constraint constraints.txt --requirement $(DOCS)/requirements.txt)
	touch $@

ui: $(VENV)/ready
	$(BIN)/mmphi ui --port $(PORT)

status: $(VENV)/ready
	$(BIN)/mmphi status --preset $(PRESET)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmphi needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing mmphi and its packages into $(VENV)"
	@$(call install,$(VENV),--constraint constraints.txt --editable '.[dev]')
	touch $@

clean:
	rm -rf $(VENV) $(SKY) $(LMMS) $(DOCS) site .mypy_cache .ruff_cache .pytest_cache
