#!/bin/sh
# Installs the Debian packages Rorqual needs where it may (root on Debian), else names them in one line.
set -eu
missing=""
need() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"; }
need crun crun
need runc runc
need cc gcc
need c++ g++
need mmdebstrap mmdebstrap
need newuidmap uidmap
need ip iproute2
need mkfs.erofs erofs-utils  # layers: mounted once, shared, on demand
need qemu-system-x86_64 qemu-system-x86  # machines
need lz4 lz4  # unpacks their kernel
need skopeo skopeo  # images from registries
need nft nftables  # for its library
[ -e /usr/lib/x86_64-linux-gnu/libc.a ] || [ -e /usr/lib/aarch64-linux-gnu/libc.a ] || missing="$missing libc6-dev"
python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python3-venv"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "rorqual: installing$missing" >&2
  apt-get update -qq >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
  echo "rorqual: this host lacks:$missing. Install them, for example: sudo apt-get install$missing" >&2
  exit 3
fi
