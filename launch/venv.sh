# shellcheck shell=bash
# shellcheck disable=SC2154 # root
# Sourced by launch/quickstart.sh and tools/test.sh, with `root` set to the folder of pyproject.toml: `set_up EXTRA`
# makes $root/.venv, or reuses it, and installs cptrain into it. Nothing outside of .venv is changed.

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

is_recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The first Python >= 3.11: $PYTHON if it is set, else python3, else one with its version in its name.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_recent "$PYTHON" || fail "PYTHON = $PYTHON: cannot be run, or is older than Python 3.11; name one that is not"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if is_recent "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "cptrain needs Python 3.11 or later, and none is on PATH ($(python3 --version 2>&1 || true))." \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

# Whether .venv runs, can install, and was made here: it holds absolute paths, so a moved checkout needs a new one. So
# does one in which an installation was killed: pip takes half a package for a whole one.
is_usable() {
  [ ! -e "$1/cptrain-installing" ] && is_recent "$1/bin/python" && "$1/bin/python" -c 'import pip' 2>/dev/null &&
    [ "$(cat "$1/cptrain-root" 2>/dev/null || echo "$root")" = "$root" ]
}

# set_up "" or set_up dev: returns at once where the same was installed before.
set_up() {
  local extra=$1 venv=$root/.venv fingerprint python stamp status=0
  if ! is_usable "$venv"; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version) ..."
    "$python" -m venv --clear "$venv" || fail \
      "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
  fi
  echo "$root" >"$venv/cptrain-root"
  fingerprint=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
  for stamp in "$venv/cptrain-installed-$extra" "$venv/cptrain-installed-dev"; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
      return
    fi
  done
  echo "Installing cptrain and its dependencies (the first time takes minutes: torch is large) ..."
  touch "$venv/cptrain-installing"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}" || status=$?
  rm "$venv/cptrain-installing"
  [ "$status" = 0 ] || exit "$status"
  echo "$fingerprint" >"$venv/cptrain-installed-$extra"
}
