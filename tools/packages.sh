# Sourced by the scripts beside it: installs Debian packages, and only for commands that are missing.
# shellcheck shell=bash

# as_root COMMAND...: runs it as root, or says what to run.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "not root and no sudo: run this as root, then start again:" >&2
        echo "  $*" >&2
        return 1
    fi
}

# install_missing COMMAND=PACKAGE...: a COMMAND that begins with / is a file, one that begins with
# py: a Python module. Says what it installs and installs it in one go.
install_missing() {
    local pair probe package missing=()
    for pair in "$@"; do
        probe=${pair%%=*} package=${pair#*=}
        case $probe in
        /*) [ -e "$probe" ] || missing+=("$package") ;;
        py:*) /usr/bin/python3 -c "import ${probe#py:}" 2>/dev/null || missing+=("$package") ;;
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$probe" >/dev/null || missing+=("$package") ;;
        esac
    done
    if [ ${#missing[@]} = 0 ]; then
        return 0
    fi
    if ! command -v apt-get >/dev/null; then
        echo "missing, and this is not Debian; install the like of: ${missing[*]}" >&2
        return 1
    fi
    echo "installing with apt: ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# require_rust: a toolchain that is new enough for Cargo.toml, on PATH or where rustup puts it.
require_rust() {
    local wanted have
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    export PATH
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    have=$(cargo --version 2>/dev/null | cut -d' ' -f2 || true)
    if [ -n "$have" ] && printf '%s\n%s\n' "$wanted" "$have" | sort --check=quiet --version-sort; then
        return 0
    fi
    echo "Rust $wanted or newer is needed; found: ${have:-none}." >&2
    echo "Get one with rustup (https://rustup.rs, or Debian's package rustup):" >&2
    echo "  rustup default stable" >&2
    echo "and run this script again." >&2
    return 1
}
