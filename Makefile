PYTHON ?= python3
V = .venv/bin
DEVICE ?= auto
PRESET ?= tiny

.PHONY: demo test lint torture cbis clean

# One stamp file: the environment is made once and again when a requirement changes.
.venv/stamp: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(V)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/stamp
	$(V)/python mamgan.py demo --out runs/demo

test: .venv/stamp
	$(V)/python -m pytest -m "not torture"

torture: .venv/stamp
	$(V)/python -m pytest -m torture -s

lint: .venv/stamp
	$(V)/ruff check .
	$(V)/ruff format --check .

clean:
	rm -rf runs
