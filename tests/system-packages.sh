#!/usr/bin/env bash
# What the tests need beside Python: a browser for the report. Installs it where it may.
set -euo pipefail
if command -v chromium >/dev/null 2>&1; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "Installing Chromium for the tests of the report (a download of about 100 MB)."
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
else
  echo "chromium is not installed: the tests of the report in a browser will not run." >&2
fi
