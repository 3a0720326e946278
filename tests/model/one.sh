#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
# one.sh FILE SECONDS -Dflags...: verify one configuration; prints "ok STATES", "VIOLATION ..." or "INCOMPLETE ...".
# TRAIL=NAME keeps the counterexample as NAME.txt. OPT=-O0 to -O3 has gcc compile the verifier; without that tcc does, if
# it is there: 0.03 s instead of 1.3 s, and the verifier is half as fast. That pays up to three million states.
here=$(cd "$(dirname "$0")" && pwd); model=$1 limit=$2; shift 2
work=$(mktemp -d "${TMPDIR:-/tmp}/model.XXXXXX") || exit 3
trap 'rm -rf "$work"' EXIT
cp "$here"/*.pml "$here"/*.h "$work" && cd "$work" || exit 3
spin -a "$@" "$model" >spin.log 2>&1 && [ -e pan.c ] || { echo "INCOMPLETE spin: $(tail -1 spin.log)"; exit 3; }
# States are stored as they are while there are few: to compress them takes a third longer.
[ "$OPT" ] && compress=-DCOLLAPSE
if [ -z "$CC$OPT" ] && command -v tcc >/dev/null; then CC=tcc; fi
${CC:-cc} ${OPT:--O0} -w -DSAFETY ${compress-} -DMEMLIM="${MEM:-5000}" -DVECTORSZ=2048 -o pan pan.c 2>cc.log || { echo "INCOMPLETE cc: $(head -1 cc.log)"; exit 3; }
timeout --foreground "$limit" ./pan -m"${DEPTH:-1000000}" -w"${HASH:-23}" >pan.log 2>&1; rc=$?
states=$(awk '/states, stored/{print $1}' pan.log)
if grep -q 'errors: 0' pan.log && [ $rc = 0 ]; then
  if grep -q 'search depth too small' pan.log; then echo "INCOMPLETE depth ($states states)"; else echo "ok $states"; fi
elif grep -q 'errors: [1-9]' pan.log; then
  echo "VIOLATION $(grep -m1 '^pan:' pan.log | sed 's/pan:[0-9]*: //; s/ (at depth.*//') (after $states states)"
  [ -n "$TRAIL" ] && { cp *.trail "$OLDPWD/$TRAIL.trail"; spin -t "$@" "$model" >"$OLDPWD/$TRAIL.txt" 2>&1; }
else echo "INCOMPLETE rc=$rc $(tail -1 pan.log)"; fi
