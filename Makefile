# make demo   everything from nothing: environment, tiny world, caches, training, edits, contact sheet, figures
# make demo-np-edit   the same by the other objective: an editor of four steps, taught by a tiny vision-language model
# make demo-video   the same with clips, and both experts of a tiny Wan2.2: also mp4s
# make test   the whole test suite on the CPU, a process a core; the review page's tests skip without Chromium (on the PATH or from `playwright install chromium`)
#
# Uses the active virtual or conda environment (not conda's base) if there is one, else makes .venv. An installed torch is
# never replaced: one that is too old stops the installation. Where none is, TORCH is installed.
# Linux without a GPU: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONDA := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
VENV ?= $(or $(VIRTUAL_ENV),$(CONDA),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.byg-installed
TORCH_THERE := $(VENV)/torch-constraint.txt
TORCH_LINE := from importlib.metadata import version; print('torch==' + version('torch'))
DEMO_OUT ?= demo_out
DEMO_NP_EDIT_OUT ?= demo_np_edit_out
DEMO_VIDEO_OUT ?= demo_video_out

.PHONY: demo demo-np-edit demo-video test lint install clean

demo: $(STAMP)
	$(BIN)/python -m byg_plugin.demo --out $(DEMO_OUT)

demo-np-edit: $(STAMP)
	$(BIN)/python -m byg_plugin.demo --objective np_edit --out $(DEMO_NP_EDIT_OUT)

demo-video: $(STAMP)
	$(BIN)/python -m byg_plugin.demo.video --out $(DEMO_VIDEO_OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c "$(TORCH_LINE)" > $(TORCH_THERE)
	$(BIN)/python -m pip install -c constraints.txt -c $(TORCH_THERE) -e ".[dev]"
	touch $@

clean:
	rm -rf $(DEMO_OUT) $(DEMO_NP_EDIT_OUT) $(DEMO_VIDEO_OUT) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
