#!/usr/bin/env bash
# Builds learn2learn 0.2.0 from its source and installs it beside the active environment's torch, which stays as it is.
#
# Why not pip: the C in the source archive was written by an old Cython and no Python since 3.11 compiles it
# (longintrepr.h is gone), so Cython writes it anew here, in an environment that is thrown away. And what its setup.py
# asks for would bring another torch with it: here come those packages alone that importing it needs.
set -euo pipefail
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

version=0.2.0
sha256=69f1d7cb0d0a6be7a2c6ad8e83e2ebbe70fb05e51d61e45e63078b40c75ea419
cython=3.3.1           # learn2learn is of the time of 0.29, but with this its own tests pass that need no download
old_torchvision=0.16.2 # the last that imports where its compiled operators do not load

say() { echo "install_learn2learn: $*"; }
die() { say "$*" >&2; exit 1; }
run() { echo "+ $*"; "$@"; }
imports() { python -W ignore -c "import $1" >/dev/null 2>&1; }
torch() { python -c 'import torch; print(torch.__version__)'; }
learn2learn() { python -W ignore -c "import learn2learn as l; assert l.__version__ == '$version'"; }

command -v python >/dev/null || die "no python on PATH; activate the environment to install into"
imports pip || die "$(command -v python) has no pip; python -m ensurepip gives it one"
imports torch || die "no torch in $(command -v python); pip install -r requirements.txt first"
before=$(torch)
if learn2learn >/dev/null 2>&1; then
    say "learn2learn $version is there already, and imports"
    exit 0
fi
command -v "${CC:-cc}" >/dev/null || die "no C compiler (${CC:-cc}); install one, such as the package build-essential"
header=$(python -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
test -e "$header" || die "no $header; install Python's headers, such as the package python3-dev"

say "what importing learn2learn needs: gym, requests, scipy"
run python -m pip install gym==0.26.2 requests scipy

if ! imports torchvision; then
    matching="0.$((${before:2:2} + 15)).*" # torchvision 0.28 is of torch 2.13
    say "torchvision, which it imports as well: $matching, of torch $before"
    run python -m pip install --no-deps "torchvision==$matching" || true
    if ! imports torchvision; then
        say "$matching does not load here: it is for a torch with CUDA. $old_torchvision does, without its operators"
        run python -m pip install --no-deps "torchvision==$old_torchvision" || true
    fi
    imports torchvision ||
        die "no torchvision that imports; install the one of torch $before: https://pytorch.org/get-started/locally"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say "the source, its C written anew by Cython $cython, and a wheel of it"
run python -m venv "$work/build"
build=$work/build/bin
run "$build/python" -m pip install "setuptools<81" wheel "cython==$cython"
echo "learn2learn==$version --hash=sha256:$sha256" >"$work/source.txt"
run "$build/python" -m pip download --no-deps --no-build-isolation --no-binary learn2learn \
    -d "$work" -r "$work/source.txt"
tar -xzf "$work/learn2learn-$version.tar.gz" -C "$work"
source=$work/learn2learn-$version
rm "$source"/learn2learn/data/*.c
run "$build/cython" -3 "$source"/learn2learn/data/*.pyx
run "$build/python" -m pip wheel --no-deps --no-build-isolation -w "$work/wheel" "$source"
run python -m pip install --no-deps --force-reinstall "$work"/wheel/learn2learn-*.whl

test "$(torch)" = "$before" || die "torch was $before and is $(torch) now; reinstall it"
learn2learn || die "learn2learn was built but does not import; the error is above"
say "learn2learn $version imports; torch is $before, as before"
