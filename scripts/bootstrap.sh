#!/bin/sh
# Installs what the Python packages cannot bring along, where it is missing: venv support, a C++ compiler with
# Python's headers for torch.compile, and the software renderer of the simulator. Does nothing on a machine that has them.
set -eu
PYTHON=${1:-python3}
command -v "$PYTHON" >/dev/null || { echo "vat_fast needs Python 3.10 or newer; '$PYTHON' was not found." >&2; exit 1; }
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "vat_fast needs Python 3.10 or newer; '$PYTHON' is $("$PYTHON" --version 2>&1)." >&2; exit 1; }

missing=""
"$PYTHON" -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
command -v g++ >/dev/null || missing="$missing g++"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
    || missing="$missing python3-dev"
ldconfig -p 2>/dev/null | grep -q libOSMesa || [ -e /usr/lib/*/libOSMesa.so.8 ] || missing="$missing libosmesa6"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "Please install first (names as on Debian):$missing" >&2; exit 1
fi
SUDO=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "Please run as root first: apt-get install$missing" >&2; exit 1; }
    SUDO=sudo
fi
echo "Installing with apt-get:$missing"
$SUDO apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $SUDO apt-get install -y -qq --no-install-recommends $missing
