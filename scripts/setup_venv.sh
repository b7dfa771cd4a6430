#!/bin/sh
# Creates the virtual environment $1 and installs Rorqual into it with everything the demo and the tests need.
set -eu
venv="$1"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "rorqual: Python 3.11 or newer is needed, found $(python3 --version)" >&2; exit 3; }
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
echo "rorqual: setting up $venv (a few minutes on the first run)" >&2
"$venv/bin/python" -c 'import torch' 2>/dev/null || "$venv/bin/pip" install -q torch==2.13.0
"$venv/bin/pip" install -q -e '.[dev]'
