PYTHON ?= python3
V = .venv/bin
DEVICE ?= auto
PRESET ?= tiny

.PHONY: demo test torture lint size cbis clean

# One stamp file: the environment is made once and again when a requirement changes.
.venv/stamp: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(V)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/stamp
	$(V)/python mamgan.py demo --out runs/demo

test: .venv/stamp
	$(V)/python -m pytest

# Hours: every command killed, starved and fed bad files (the tests hold a short version).
torture: .venv/stamp
	OMP_NUM_THREADS=1 $(V)/python -W ignore -m tests.torture

# Table 1 on your own masses: make cbis MANIFEST=... [PRESET=tiny|cbis] [DEVICE=cpu|cuda]
C = runs/cbis-$(PRESET)
M = $(V)/python mamgan.py
SETS = --synthetic $(C)/synthetic-mass --synthetic $(C)/synthetic-removal
SEEDS ?= 3
PROPORTIONS ?= 0.10 0.25 0.50 0.75 1.00

cbis: .venv/stamp
	@test -f "$(MANIFEST)" || { echo "make cbis: MANIFEST='$(MANIFEST)' is no file; give MANIFEST=/path/to/manifest.csv"; exit 1; }
	$(M) prepare "$(MANIFEST)" --out $(C)/patches --preset $(PRESET) --normals annotated --qc 12
	set -e; for task in mass removal; do \
	  $(M) train-gan --task $$task --data $(C)/patches --run $(C)/gan-$$task --preset $(PRESET) --device $(DEVICE); \
	  $(M) synthesize --gan $(C)/gan-$$task --data $(C)/patches --out $(C)/synthetic-$$task -n 1000 --device $(DEVICE); \
	  $(M) synthesize --gan $(C)/gan-$$task --data $(C)/patches --out $(C)/blob-$$task -n 1000 --control blob --device $(DEVICE); \
	done
	$(M) train-cls --data $(C)/patches --run $(C)/cls-baseline --preset $(PRESET) --seeds $(SEEDS) --device $(DEVICE)
	set -e; for p in $(PROPORTIONS); do \
	  $(M) train-cls --data $(C)/patches --run $(C)/cls-$$p --preset $(PRESET) --seeds $(SEEDS) --device $(DEVICE) $(SETS) --proportion $$p; \
	done
	$(M) train-cls --data $(C)/patches --run $(C)/cls-blob --preset $(PRESET) --seeds $(SEEDS) --device $(DEVICE) \
	  --synthetic $(C)/blob-mass --synthetic $(C)/blob-removal --proportion 0.50
	$(M) evaluate --data $(C)/patches --baseline $(C)/cls-baseline $(SETS) \
	  --synthetic $(C)/blob-mass --synthetic $(C)/blob-removal --out $(C)/report --device $(DEVICE) \
	  $(foreach p,$(PROPORTIONS),--augmented $(C)/cls-$(p)) --augmented $(C)/cls-blob

lint: .venv/stamp
	$(V)/ruff check .
	$(V)/ruff format --check .
	$(V)/python tests/size.py

# Code lines of each module against the limits.
size: .venv/stamp
	@$(V)/python tests/size.py

clean:
	rm -rf runs
