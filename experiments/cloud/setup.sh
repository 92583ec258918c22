#!/usr/bin/env bash
# What a fresh cloud machine needs, in the project's folder.
set -euo pipefail
make .venv/ready
