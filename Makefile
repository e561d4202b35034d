# Keyfleet. Two commands matter: make demo, make test.
#
# Needs make and Go (see go.mod for the version); everything else is fetched by
# Go's own tools or, for the heavier tests, installed by build/setup (as root).

SHELL      := /bin/sh
GO         ?= go
VERSION    ?= 0.1.0
LDFLAGS    := -s -w -X main.version=$(VERSION)
GOBUILD    := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
PROGRAMS   := keyfleet keyfleet-server keyfleet-agent keyfleet-keyvault-extension keyfleet-connector
KV_VERSION := 3.0.$(lastword $(subst ., ,$(VERSION)))
KV_PACKAGE := bin/packages/Microsoft.Azure.KeyVault.KeyVaultForLinux-$(KV_VERSION).zip

.PHONY: build demo test test-deep cluster cluster-down bench fuzz dist clean

build: ## build all programs and the extension package into bin/
	@mkdir -p bin/packages
	$(GOBUILD) -o bin/ $(PROGRAMS:%=./cmd/%)
	@rm -f bin/packages/*.zip
	$(GO) run ./build/package-extension -binary bin/keyfleet-keyvault-extension -version $(KV_VERSION) -out $(KV_PACKAGE)

demo: build ## the main job: a certificate reaches three nodes and renews itself there
	@CGO_ENABLED=0 $(GO) build -buildvcs=false -o bin/demo ./demo
	@bin/demo

test: ## everything; SHORT=1 leaves out what takes minutes
	@GO='$(GO)' SHORT='$(SHORT)' sh build/test

test-deep: ## rotate-certs on real clusters with every fault at every place, as root; takes hours
	@$(GO) run ./test/bed/cmd/bed prepare
	@KEYFLEET_TEST_DEEP=1 CGO_ENABLED=0 $(GO) test -count=1 -v -p 1 -timeout 8h ./test/rotation ./test/connector

cluster: ## a real Kubernetes cluster on this machine, as root: LAYOUT=kubeadm or aks-engine, MASTERS=3 WORKERS=1
	@$(GO) build -o bin/bed ./test/bed/cmd/bed
	@bin/bed prepare
	@bin/bed up -layout $(or $(LAYOUT),kubeadm) -masters $(or $(MASTERS),3) -workers $(or $(WORKERS),1)

cluster-down: ## takes it down
	@$(GO) build -o bin/bed ./test/bed/cmd/bed
	@bin/bed down -layout $(or $(LAYOUT),kubeadm)

bench: build ## the figures of the README; ONLY=server, connections or rotation for one of the tables
	@GO='$(GO)' ONLY='$(ONLY)' sh build/bench

fuzz: ## every fuzz target for FUZZTIME each (default 10s)
	@GO='$(GO)' FUZZTIME='$(FUZZTIME)' sh build/fuzz

dist: ## release binaries for the platforms we build for
	@GO='$(GO)' LDFLAGS='$(LDFLAGS)' VERSION='$(VERSION)' sh build/dist

clean:
	rm -rf bin dist
