#!/usr/bin/env bash
# PID 1 of one node, already in its own network, mount and PID namespaces. When it ends, the kernel ends every process
# and mount of the node with it. In the environment: NODE ADDRESS PODS ALL_PODS DNS CGROUP STATE BIN.
set -euo pipefail
disk=$STATE/$NODE keys=$STATE/pki logs=$STATE/logs/$NODE

own_mounts() { # the daemons' default paths lead to this node's part of the state folder
  mount --make-rprivate / && mount -t proc proc /proc && mount --make-rshared /
  mkdir -p "$logs" "$disk"/{varlog,kubelet,containerd,cni}
  mount -t tmpfs tmpfs /run
  mkdir -p /run/netns /run/containerd
  local pair
  for pair in varlog:/var/log kubelet:/var/lib/kubelet containerd:/var/lib/containerd cni:/var/lib/cni; do
    mkdir -p "${pair#*:}"
    mount --bind "$disk/${pair%%:*}" "${pair#*:}"
  done
  mount --make-rshared /var/lib/kubelet
}

own_cgroups() {
  local root file group
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then # v2
    sed 's/\([a-z]\+\)/+\1/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control || true
    mkdir -p "/sys/fs/cgroup/$CGROUP/$NODE"
    echo 1000 >"/sys/fs/cgroup/$CGROUP/cpu.weight" || true
    return
  fi
  for root in /sys/fs/cgroup/*/; do mkdir -p "$root$CGROUP/$NODE" 2>/dev/null || true; done
  # A group weighs as much as one process outside of groups: all pods together would starve beside busy tests.
  echo 10240 >"/sys/fs/cgroup/cpu/$CGROUP/cpu.shares" || true
  for file in cpus mems; do # containers fail to start under a parent whose cpuset is empty
    for group in "$CGROUP" "$CGROUP/$NODE"; do
      [ ! -e "/sys/fs/cgroup/cpuset/cpuset.$file" ] ||
        cat "/sys/fs/cgroup/cpuset/cpuset.$file" >"/sys/fs/cgroup/cpuset/$group/cpuset.$file"
    done
  done
}

write_configs() {
  mkdir -p "$disk/cni.d"
  cat >"$disk/cni.d/10-bridge.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$PODS"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
  cat >"$disk/containerd.toml" <<TOML
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/local/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$disk/cni.d"
TOML
  echo "nameserver $DNS" >"$disk/resolv.conf"
  cat >"$disk/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $ADDRESS
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $keys/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $keys/$NODE.crt
tlsPrivateKeyFile: $keys/$NODE.key
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP/$NODE
enforceNodeAllocatable: []
failSwapOn: false
failCgroupV1: false
resolvConf: $disk/resolv.conf
clusterDomain: cluster.local
clusterDNS: [$DNS]
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
nodeStatusUpdateFrequency: 4s
evictionHard: {memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%", nodefs.inodesFree: "1%"}
YAML
}

start() {
  local name=$1
  shift
  "$@" >>"$logs/$name.log" 2>&1 &
}

import_images() {
  local archive
  for archive in "$STATE"/images/*.tar; do
    ctr -n k8s.io images import "$archive" >>"$logs/images.log" 2>&1
  done
}

until_answering() {
  for _ in $(seq 200); do
    "$@" >/dev/null 2>&1 && return
    sleep 0.1
  done
  echo "no answer after 20 s: $*" >&2
  exit 1
}

own_mounts
own_cgroups
write_configs
sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true
start containerd containerd -c "$disk/containerd.toml"
until_answering ctr version
import_images
start kubelet "$BIN/kubelet" --config="$disk/kubelet.yaml" --kubeconfig="$STATE/$NODE.kubeconfig" \
  --hostname-override="$NODE" --node-ip="$ADDRESS"
start kube-proxy "$BIN/kube-proxy" --kubeconfig="$STATE/proxy.kubeconfig" --hostname-override="$NODE" \
  --proxy-mode=iptables --cluster-cidr="$ALL_PODS" --conntrack-max-per-core=0
# PID 1 takes in orphans.
while :; do
  wait -n || true
  sleep 0.2
done
