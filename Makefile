PYTHON ?= python3
V = .venv/bin
DEVICE ?= auto
PRESET ?= tiny

.PHONY: demo test torture lint size cbis experiment experiment-report fold clean

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

# Cross-validation by patient, every regime, then with a quarter and a tenth of the women with cancer,
# and the gain over their number (gain.png): make experiment MANIFEST=... - about 12 hours of one core
# at `tiny` (the sum of its measured parts); interrupted, it goes on.
# FOLDS="1 2" and FOLDS="3 4 5" in two terminals share the work; then make experiment-report.
FOLDS ?= 1 2 3 4 5
SHARES ?= 1 0.25 0.10
experiment: .venv/stamp
	@test -f "$(MANIFEST)" || { echo "make experiment: MANIFEST='$(MANIFEST)' is no file; give MANIFEST=/path/to/manifest.csv"; exit 1; }
	set -e; for share in $(SHARES); do for k in $(FOLDS); do $(MAKE) --no-print-directory fold K=$$k SHARE=$$share; done; done
	$(if $(filter 5,$(words $(FOLDS))),$(MAKE) --no-print-directory experiment-report,@echo "all folds done? make experiment-report")

experiment-report: .venv/stamp
	set -e; for share in $(SHARES); do \
	  $(M) evaluate $(foreach k,1 2 3 4 5,--folds runs/experiment-$(PRESET)/share-$$share/fold-$(k)/report) \
	    --out runs/experiment-$(PRESET)/share-$$share/report; \
	done
	$(V)/python -m support.gain runs/experiment-$(PRESET)/gain.png \
	  $(foreach share,$(SHARES),runs/experiment-$(PRESET)/share-$(share)/report)

# One fold: GANs of its training patients, synthetic sets, classifiers, report; seeds of its own.
# Fewer patients (SHARE below 1): without the other doses.
E = runs/experiment-$(PRESET)/share-$(SHARE)/fold-$(K)
CLS = $(M) train-cls --data $(E)/patches --preset $(PRESET) --seeds $(SEEDS) --seed $(K)0 --device $(DEVICE)
GAN_SETS = --synthetic $(E)/synthetic-mass --synthetic $(E)/synthetic-removal
BLOBS = --synthetic $(E)/blob-mass --synthetic $(E)/blob-removal
REGIMES = 50 blob classical classical-50 classical-blob $(if $(filter 1,$(SHARE)),25 75)
fold: .venv/stamp
	$(M) prepare "$(MANIFEST)" --out $(E)/patches --preset $(PRESET) --normals annotated --fold $(K)/5 --malignant-share $(SHARE)
	set -e; for task in mass removal; do \
	  $(M) train-gan --task $$task --data $(E)/patches --run $(E)/gan-$$task --preset $(PRESET) --seed $(K) --device $(DEVICE); \
	  $(M) synthesize --gan $(E)/gan-$$task --data $(E)/patches --out $(E)/synthetic-$$task -n 1000 --device $(DEVICE); \
	  $(M) synthesize --gan $(E)/gan-$$task --data $(E)/patches --out $(E)/blob-$$task -n 1000 --control blob --device $(DEVICE); \
	done
	$(CLS) --run $(E)/cls-baseline
	$(CLS) --run $(E)/cls-50 $(GAN_SETS) --proportion 0.50
	$(CLS) --run $(E)/cls-classical --augment classical
	$(CLS) --run $(E)/cls-classical-50 --augment classical $(GAN_SETS) --proportion 0.50
	$(CLS) --run $(E)/cls-blob $(BLOBS) --proportion 0.50
	$(CLS) --run $(E)/cls-classical-blob --augment classical $(BLOBS) --proportion 0.50
ifeq ($(SHARE),1)
	$(CLS) --run $(E)/cls-25 $(GAN_SETS) --proportion 0.25
	$(CLS) --run $(E)/cls-75 $(GAN_SETS) --proportion 0.75
endif
	$(M) evaluate --data $(E)/patches --baseline $(E)/cls-baseline $(GAN_SETS) $(BLOBS) --out $(E)/report --device $(DEVICE) \
	  $(foreach name,$(REGIMES),--augmented $(E)/cls-$(name))

lint: .venv/stamp
	$(V)/ruff check .
	$(V)/ruff format --check .
	$(V)/python tests/size.py

# Code lines of each module against the limits.
size: .venv/stamp
	@$(V)/python tests/size.py

clean:
	rm -rf runs
