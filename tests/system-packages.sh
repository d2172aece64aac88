#!/usr/bin/env bash
# What the tests need beside Python: a browser for the report, and what the nodes of the test cluster run. Installs it
# where it may (root on Debian); elsewhere it says what is missing, and the tests that need it say so too.
set -euo pipefail

packages=()
need() { # PACKAGE PROGRAM...: the package, unless all its programs are there
  local package=$1 program
  shift
  for program in "$@"; do
    command -v "$program" >/dev/null 2>&1 || [ -e "$program" ] || { packages+=("$package"); return; }
  done
}

need chromium chromium
need npm node npm
need openssl openssl
need containerd containerd ctr
need runc runc
need containernetworking-plugins /usr/lib/cni/bridge
need iptables iptables
need iproute2 ip
need conntrack conntrack
need procps ps sysctl
need util-linux nsenter unshare
need debootstrap debootstrap
need buildah buildah
need prometheus prometheus promtool
need gcc gcc
need libc6-dev /usr/include/stdlib.h

[ "${#packages[@]}" -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "Not installed, and only root can install it: ${packages[*]}. The tests that need it will not run." >&2
  exit 0
fi

echo "Installing ${packages[*]} (Chromium is a download of about 100 MB, the rest 60 MB)."
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # the test cluster starts containerd itself, per node; no service of the machine's is wanted
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
