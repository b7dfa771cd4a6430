#!/bin/sh
# Installs the Debian packages Rorqual needs where it may (root on Debian), else names them in one line.
#   setup_host.sh         what `make demo` needs
#   setup_host.sh test    what the tests run beside that: machines, images, networks, gVisor
set -eu
missing=""
need() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"; }
need_file() { [ -e "$1" ] || missing="$missing $2"; }
need crun crun
need runc runc
need cc gcc
need c++ g++
need newuidmap uidmap
[ -e /usr/lib/x86_64-linux-gnu/libc.a ] || [ -e /usr/lib/aarch64-linux-gnu/libc.a ] || missing="$missing libc6-dev"
python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python3-venv"
if [ "${1:-}" = test ]; then
  need mmdebstrap mmdebstrap            # images and disks of Debian packages
  need mkfs.erofs erofs-utils           # layers: mounted once, shared, on demand
  need skopeo skopeo                    # images from registries
  need ip iproute2                      # networks of sandboxes
  need nft nftables                     # their rules, through its library
  need runsc runsc                      # gVisor
  need qemu-system-x86_64 qemu-system-x86  # machines
  need qemu-img qemu-utils              # their disks
  need lz4 lz4                          # unpacks their kernel
  need xorriso xorriso                  # their cloud-init seed
  need sfdisk fdisk                     # disks that boot: partitions,
  need mke2fs e2fsprogs                 # the file system,
  need mcopy mtools                     # the EFI partition,
  need grub-mkimage grub-common         # and the loader, for BIOS and UEFI
  need_file /usr/lib/grub/i386-pc/boot.img grub-pc-bin
  need_file /usr/lib/grub/x86_64-efi/kernel.img grub-efi-amd64-bin
  need_file /usr/share/OVMF/OVMF_CODE.fd ovmf       # UEFI
  need_file /bin/busybox busybox-static             # the emulated host that runs Firecracker
  need_file /usr/lib/memtest86+/memtest86+x64.iso memtest86+  # a guest that is no Linux
fi
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "rorqual: installing$missing" >&2
  apt-get update -qq >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
  echo "rorqual: this host lacks:$missing. Install them, for example: sudo apt-get install$missing" >&2
  exit 3
fi
