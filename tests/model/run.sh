#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# Verifies the protocol with SPIN: every configuration that must hold, and every broken variant that must be caught.
# One line a check, with the number of states and the seconds; the last line counts. Exit status 1 if anything is not
# as it must be, 77 if spin is not installed. With --deep also the configurations that take minutes. Whoever has not
# ended after the limit hangs: it is there for that, a quiet machine needs no more than 15 s for any of them.
cd "$(dirname "$0")" || exit 2
command -v spin >/dev/null || { echo "spin is not installed (package spin): nothing checked"; exit 77; }
deep=; [ "$1" = --deep ] && deep=1
export LC_ALL=C
limit=1200 parallel=$(nproc)
results=$(mktemp -d) || exit 2
trap 'rm -rf "$results"' EXIT
started=0 shown=0

check() { # expectation, label, one.sh's arguments
  local want=$1 label=$2 out begin=${EPOCHREALTIME/./} verdict=FAILED tenths; shift 2
  out=$(./one.sh "$1" "$limit" "${@:2}" | tail -1)
  case $want:$out in holds:ok*|caught:VIOLATION*) verdict=ok;; esac
  [ $verdict = ok ] && out="$(grep -o '[0-9]*' <<<"${out##*after}" | head -1) states"
  tenths=$(((${EPOCHREALTIME/./}-begin)/100000))
  printf '%-6s %-6s %-66s %s, %d.%d s\n' $verdict $want "$label" "$out" $((tenths/10)) $((tenths%10))
}

# Several at a time, and their lines in the order in which they stand here.
line() { # command, its arguments
  "$@" >"$results/$started.part" && mv "$results/$started.part" "$results/$started" &
  started=$((started+1))
  show
  while [ "$(jobs -rp | wc -l)" -ge "$parallel" ]; do wait -n; show; done
}
show() {
  while [ -e "$results/$shown" ]; do cat "$results/$shown"; shown=$((shown+1)); done
}
holds() { line check holds "$@"; }
many() { OPT=-Og holds "$@"; } # states: three millions and more
caught() { line check caught "$@"; }
title() { line echo "== $*"; }
M=migration.pml R=resources.pml C=change.pml F=fileset.pml L=lockspace.pml

title "one resource: chains of migrations"
holds "3 migrations, 2 user operations"                               $M -DNMIG=3 -DNOP=2 -DREL1
holds "2 migrations, Release once or twice"                           $M -DNMIG=2 -DNOP=1
holds "3 migrations, libvirtd dies at any step"                       $M -DNMIG=3 -DNOP=1 -DREL1 -DNCR=1
holds "... once or twice, libvirtd dies at any step"                  $M -DNMIG=2 -DNOP=1 -DNCR=1
holds "2 migrations, two QEMUs die at any step"                       $M -DNMIG=2 -DNOP=0 -DREL1 -DNK=2
holds "2 migrations, a QEMU and a libvirtd die"                       $M -DNMIG=2 -DNOP=1 -DREL1 -DNK=1 -DNCR=1
holds "with a stranger"                                               $M -DNMIG=2 -DNOP=1 -DREL1 -DNE=1
holds "with a stranger, a QEMU dies"                                  $M -DNMIG=1 -DNOP=1 -DREL1 -DNE=1 -DNK=1
holds "with a stranger, libvirtd dies"                                $M -DNMIG=1 -DNOP=1 -DREL1 -DNE=1 -DNCR=1
holds "with a rogue: qcow2 and the guard"                             $M -DNMIG=2 -DNOP=1 -DREL1 -DNR=1 -DMETA -DGUARD -DNEVER
holds "with a rogue: raw image, no guard; a QEMU dies"                $M -DNMIG=1 -DNOP=1 -DREL1 -DNR=1 -DNK=1
holds "owner given up to any peer, not only to a joiner"              $M -DNMIG=2 -DNOP=2 -DREL1 -DNCR=1 -DANYPEER
holds "nothing goes wrong: every migration succeeds"                  $M -DNMIG=3 -DNOP=1 -DLIVE
holds "... with a stranger that tries twice"                          $M -DNMIG=2 -DNOP=0 -DNE=2 -DLIVE -DRAN
holds "... the first one of a guest that never ran"                   $M -DNMIG=1 -DNOP=0 -DNE=2 -DLIVE -DNEVER
title "one resource: cold starts"
holds "3 hosts start one domain: exactly one wins"                    $M -DCOLD=3
holds "... with the guard, a QEMU dies"                               $M -DCOLD=3 -DGUARD -DNK=1
holds "2 hosts start one domain, a stranger"                          $M -DCOLD=2 -DNE=1
holds "shared-write: 3 hosts start one domain, a QEMU dies"           $M -DSW -DCOLD=3 -DNK=1
holds "shared-write: 2 hosts start one domain, a stranger"            $M -DSW -DCOLD=2 -DNE=1
holds "3 domains, any modes: never do all fail"                       modes.pml -DN=3 -DRETRY=2
holds "... where remote read locks are invisible (NFSv3)"             modes.pml -DN=3 -DRETRY=2 -DNFS3
holds "... a QEMU dies (also: a reader's migration)"                  modes.pml -DN=3 -DRETRY=0 -DNK=1 -DNOL2
holds "... readers come and go"                                       modes.pml -DN=3 -DRETRY=1 -DCOMES -DNOL2
holds "... downgrade and upgrade"                                     modes.pml -DN=3 -DRETRY=2 -DDOWN
holds "3 domains that share resources pairwise"                       two.pml -DN=3
title "a lease goes from exclusive to reading and back"
holds "two guests, three calls, two libvirtds die at any step"        $C -DNOP=3 -DNCR=2
holds "... where the descriptor is open for reading only"             $C -DNOP=3 -DNCR=2 -DB=1
holds "two guests, another in any mode, libvirtd dies"                $C -DNOP=1 -DNE=1 -DNCR=1
holds "... where the descriptor is open for reading only"             $C -DNOP=1 -DNE=1 -DNCR=1 -DB=1
holds "another in any mode, a QEMU and a libvirtd die"                $C -DNOP=1 -DNE=1 -DNCR=1 -DNK=1 -DALONE
holds "where read locks are invisible (NFSv3), libvirtd dies"         $C -DNOP=1 -DNE=1 -DNCR=1 -DNFS3
title "shared-write in a migration"
holds "2 migrations, a stranger in any mode"                          $M -DSW -DNMIG=2 -DNOP=0 -DREL1 -DNE=1
holds "... libvirtd dies"                                             $M -DSW -DNMIG=2 -DNOP=1 -DREL1 -DNCR=1
holds "1 migration, a stranger in any mode, a QEMU dies"              $M -DSW -DNMIG=1 -DNOP=1 -DREL1 -DNE=1 -DNK=1
holds "nothing goes wrong: every migration succeeds"                  $M -DSW -DNMIG=3 -DNOP=0 -DLIVE
title "file set"
holds "three incarnations, a libvirtd or a child dies"                $F -DN=3 -DNOP=1 -DNC=1
holds "... attaches again, a libvirtd dies"                           $F -DNOP=2 -DNL=2 -DNC=1
holds "... a libvirtd and a QEMU die; the image is flocked too"       $F -DNOP=2 -DNC=1 -DNK=1 -DIMAGE
holds "... a sweeper"                                                 $F -DNOP=1 -DNC=1 -DSWEEPER
holds "flock of the image: owner has it, beside flock(1)"             $F -DNOP=2 -DIMAGE -DNS=1 -DNC=1 -DSTRICT
holds "... also over downgrade and upgrade"                           $F -DNOP=2 -DIMAGE -DCONV -DSTRICT
holds "... beside flock(1) and deaths: guests exclude each other"     $F -DNOP=2 -DIMAGE -DCONV -DNS=1 -DNC=1
holds "an index; any call by a version that knows of none"            $F -DNOP=2 -DCONV -DINDEX -DOLD
many  "... a libvirtd or a child dies"                                $F -DNOP=2 -DCONV -DINDEX -DOLD -DNC=1
holds "1 migration, a QEMU dies mark by mark"                         $M -DFILESET -DNMIG=1 -DNOP=1 -DREL1 -DNK=1
holds "2 migrations, libvirtd dies"                                   $M -DFILESET -DNMIG=2 -DNOP=1 -DREL1 -DNCR=1
title "lease files in a lockspace"
many  "enter, detach, sweep; one dies"                                $L -DNK=1
many  "shared guests"                                                 $L -DSHARED
many  "a stranger sweeps meanwhile; one dies"                         $L -DSTRANGER -DNK=1
many  "... beside shared guests"                                      $L -DSTRANGER -DSHARED -DNK=1
title "two resources, hot-plug"
holds "2 migrations, a QEMU and a libvirtd die"                       $R -DNMIG=2 -DNOP=1 -DNK=1 -DNCR=1
holds "1 migration, attach and detach, a stranger, libvirtd dies"     $R -DNMIG=1 -DNOP=1 -DNHP=2 -DNE=1 -DNCR=1
holds "1 migration, Release once or twice, libvirtd dies"             $R -DNMIG=1 -DNOP=2 -DNCR=1 -DREL2
holds "2 migrations, attach and detach, a QEMU dies"                  $R -DNMIG=2 -DNOP=1 -DNHP=2 -DATT=1 -DNK=1
holds "nothing goes wrong: every migration succeeds"                  $R -DNMIG=3 -DNOP=0 -DLIVE

title "broken variants"
caught "Release drops present"                                        $M -DNMIG=1 -DNOP=1 -DREL1 -DM_DROPPRES
caught "marks survive their QEMU"                                     $M -DNMIG=1 -DNOP=1 -DREL1 -DNK=2 -DM_STICKY
caught "a third incarnation may join"                                 $M -DNMIG=2 -DNOP=1 -DREL1 -DM_CROWD
caught "... only beside a source that a successor has superseded"     $M -DNMIG=3 -DNOP=2 -DREL1 -DRAN -DJ1B
caught "owner in hand is always enough, noted or not"                 $M -DNMIG=2 -DNOP=2 -DREL1 -DNCR=1 -DM_NONOTE
caught "no second look with owner in hand"                            $M -DNMIG=2 -DNOP=2 -DREL1 -DM_NORELOOK
caught "a state quotes no token, any handoff will do"                 $M -DNMIG=2 -DNOP=2 -DREL1 -DM_NOTOKEN
caught "no taken mark, a rogue passes by"                             $M -DNMIG=2 -DNOP=2 -DREL1 -DNR=1 -DM_NOTAKEN
caught "no taken mark, Release always gives owner up"                 $M -DNMIG=2 -DNOP=1 -DREL1 -DNOKEEP -DM_NOTAKEN
caught "Acquire leaves handoff up"                                    $M -DNMIG=2 -DNOP=1 -DREL1 -DM_KEEPHAND
caught "Acquire removes only what the note is sure of"                $M -DNMIG=1 -DNOP=2 -DREL1 -DNCR=1 -DM_LESSNOTE
caught "Register puts up no handoff: who never ran cannot migrate"    $M -DNMIG=1 -DNOP=0 -DLIVE -DM_REGNOHAND
caught "Register's handoff before its second look: nobody wins"       $M -DCOLD=2 -DM_REGEARLY
caught "who joins puts up a handoff as well"                          $M -DNMIG=1 -DNOP=0 -DLIVE -DM_JOINHAND
caught "joins without handoff and without free owner"                 $M -DNMIG=2 -DNOP=1 -DREL1 -DM_NOHAND
caught "a refused Acquire does not know that it took owner"           $M -DNMIG=1 -DNOP=1 -DREL1 -DNR=1 -DM_TOOK
caught "a joiner does not look again"                                 $M -DNMIG=1 -DNOP=0 -DREL1 -DNE=1 -DNK=1 -DM_NOJLOOK
caught "no guard: a cold qcow2 rogue joins"                           $M -DNMIG=1 -DNOP=1 -DREL1 -DNR=1 -DMETA
caught "cold start: no look after owner"                              $M -DCOLD=2 -DNE=1 -DM_NOLOOK
caught "cold start: joins without handoff: nobody wins"               $M -DCOLD=3 -DM_NOHAND
caught "cold start: owner asked for before present: nobody wins"      $M -DCOLD=3 -DM_ONELOOK
caught "modes: present before owner (both fail)"                      modes.pml -DN=2 -DRETRY=2 -DM_PRESFIRST
caught "modes: place, look, and no owner for shared and read-only"    modes.pml -DN=2 -DRETRY=2 -DTEXT
caught "modes: the same on NFSv3 (two writers)"                       modes.pml -DN=2 -DRETRY=2 -DTEXT -DNFS3 -DNOL2
caught "modes: no look after owner"                                   modes.pml -DN=2 -DRETRY=2 -DM_NOLOOK
caught "modes: a reader asks only before it takes owner"              modes.pml -DN=2 -DRETRY=2 -DM_ASKONCE
caught "downgrade by unlock and lock"                                 modes.pml -DN=2 -DRETRY=2 -DDOWN -DM_DOWNDROP
caught "downgrade: the marks before the vessel"                       $C -DNOP=1 -DALONE -DM_VESSELLAST
caught "upgrade: the vessel before the marks"                         $C -DNOP=1 -DALONE -DM_VESSELFIRST
caught "no call knows of a change that did not end"                   $C -DNOP=1 -DALONE -DNCR=1 -DM_NOHEAL
caught "nobody asks whether QEMU writes: exclusive for ever"          $C -DNOP=1 -DALONE -DNCR=1 -DM_NOFACT
caught "a refused upgrade gives one share back"                       $C -DNOP=1 -DM_UNDOONE
caught "upgrade through a second description without a look"          $C -DNOP=2 -DB=1 -DM_NOLOOK
caught "... present goes with owner"                                  $C -DNOP=1 -DNE=1 -DALONE -DB=1 -DM_DROPPR
caught "... where read locks are invisible (NFSv3)"                   $C -DNOP=1 -DNE=1 -DALONE -DB=1 -DNFS3
caught "... the description of before goes last"                      $C -DNOP=1 -DALONE -DNCR=1 -DB=1 -DM_TIDYLAST
caught "shared-write: a joiner does not look again"                   $M -DSW -DNMIG=1 -DNOP=0 -DREL1 -DNE=1 -DNK=1 -DM_NOJLOOK
caught "shared-write: a third incarnation may join"                   $M -DSW -DNMIG=2 -DNOP=1 -DREL1 -DM_CROWD
caught "file set without gate"                                        $F -DNOP=2 -DM_NOGATE -DM_NONLINK
caught "file set: gate through the vessel's description"              $F -DNOP=2 -DNC=1 -DM_SHAREDGATE
caught "file set: sweeping outside the gate: a start is refused"      $F -DNOP=2 -DSWEEPER -DM_SWEEP
caught "file set: ... and nobody asks whether his file has a name"    $F -DNOP=2 -DSWEEPER -DM_SWEEP -DM_NONLINK
caught "file set: the file is flocked after the gate"                 $F -DNOP=2 -DM_EARLYGATE -DM_NONLINK
caught "file set: files count that nobody holds"                      $F -DNOP=2 -DNC=1 -DM_NOTRIAL
caught "file set: one's own dead file is in the way (O_EXCL)"         $F -DNOP=2 -DNL=2 -DM_EXCL
caught "file set: text before the image's flock"                      $F -DNOP=2 -DIMAGE -DM_TEXTFIRST
caught "file set: the image's flock is dropped before the text"       $F -DNOP=2 -DIMAGE -DM_IMAGEFIRST
caught "file set: an index that older versions do not sweep"          $F -DNOP=2 -DCONV -DINDEX -DOLD -DM_IXKEPT
caught "file set: marks before the index says so"                     $F -DNOP=2 -DCONV -DINDEX -DNC=1 -DM_IXLATE
caught "file set: the index says so before the marks go"              $F -DNOP=2 -DCONV -DINDEX -DNC=1 -DM_IXEARLY
caught "file set: the index does not tell of readers"                 $F -DNOP=2 -DCONV -DINDEX -DM_IXNOREADERS
caught "no guarantee: flock(1) while the image's flock is converted"  $F -DNOP=2 -DIMAGE -DCONV -DNS=1 -DSTRICT
caught "no guarantee: libvirtd dies in the conversion"                $F -DNOP=2 -DIMAGE -DCONV -DNC=1 -DSTRICT
caught "no guarantee: a busy image is flock(1)'s; a QEMU dies"        $F -DNOP=2 -DIMAGE -DNK=1 -DFOREIGN
caught "no guarantee: a busy image is flock(1)'s; a libvirtd dies"    $F -DNOP=2 -DIMAGE -DNC=1 -DFOREIGN
caught "file set: a third incarnation may join"                       $M -DFILESET -DNMIG=2 -DNOP=1 -DREL1 -DM_CROWD
caught "lease file: nobody asks whether it has a name"                $L -DM_NOLISTED
caught "lease file: asked before the marks are up"                    $L -DM_EARLY
caught "lease file: swept without owner"                              $L -DM_NOOWNER
caught "lease file: a stranger sweeps without owner"                  $L -DSTRANGER -DM_NOOWNER
caught "lease file: swept without a look"                             $L -DM_SWEEPBLIND
caught "lease file: owner given back before the unlink"               $L -DM_EARLYUNLOCK
caught "lease file: unlinked by name, whichever file that is"         $L -DM_BYNAME
caught "lease file: a shared guest joins while owner is held"         $L -DSHARED -DM_ENTRY
caught "resources in no common order (both fail)"                     two.pml -DN=2 -DUNSORT=1
caught "resources: present before owner (both fail)"                  two.pml -DN=2 -DM_PRESFIRST
caught "a refused start of several keeps what it took"                two.pml -DN=3 -DM_NOUNDO
HP="-DNMIG=2 -DNOP=2 -DNCR=1 -DNHP=2 -DATT=1 -DNE=1"
caught "a refused attach keeps what it took"                          $R $HP -DM_NOUNDO
caught "a refused call undoes only one resource"                      $R -DNMIG=1 -DNOP=1 -DNE=1 -DNK=1 -DM_UNDOONE
caught "a refused Acquire keeps what it took"                         $R $HP -DM_NOGIVEBACK
caught "Acquire clears one handoff before it has all owners"          $R $HP -DM_CLEAREARLY
caught "no second look, two resources"                                $R $HP -DM_NORELOOK
caught "Release puts only the first handoff up"                       $R $HP -DM_RELONE
caught "Release: a handoff that may be up is placed once more"        $R -DNMIG=1 -DNOP=2 -DNCR=1 -DREL2 -DM_FRESH
caught "an attached disk shows the handoff of a cold start"           $R -DNMIG=0 -DNOP=0 -DNHP=1 -DATT=1 -DM_HOTHAND

if [ $deep ]; then
  wait; parallel=1 limit=7200; export MEM=12000 HASH=26 OPT=-O2
  title "deep"
  holds "3 migrations, 3 operations, a QEMU and a libvirtd die"       $M -DNMIG=3 -DNOP=3 -DREL1 -DNK=1 -DNCR=1
  holds "with a stranger, a QEMU dies"                                $M -DNMIG=2 -DNOP=1 -DREL1 -DNE=1 -DNK=1
  holds "with a stranger, libvirtd dies"                              $M -DNMIG=2 -DNOP=1 -DREL1 -DNE=1 -DNCR=1
  holds "with a rogue: qcow2 and the guard"                           $M -DNMIG=2 -DNOP=1 -DREL1 -DNR=1 -DMETA -DGUARD
  holds "with a rogue, libvirtd dies"                                 $M -DNMIG=2 -DNOP=2 -DREL1 -DNR=1 -DNCR=1
  holds "with a rogue, a QEMU dies"                                   $M -DNMIG=2 -DNOP=2 -DREL1 -DNR=1 -DNK=1
  holds "with a stranger, a QEMU and a libvirtd die"                  $M -DNMIG=2 -DNOP=1 -DREL1 -DNE=1 -DNK=1 -DNCR=1
  holds "shared-write, a stranger in any mode, a QEMU dies"           $M -DSW -DNMIG=2 -DNOP=1 -DREL1 -DNE=1 -DNK=1
  holds "file set, a QEMU and a libvirtd die"                         $M -DFILESET -DNMIG=2 -DNOP=1 -DREL1 -DNK=1 -DNCR=1
  holds "file set, 2 migrations, a QEMU dies mark by mark"            $M -DFILESET -DNMIG=2 -DNOP=1 -DREL1 -DNK=1
  holds "file set, 2 migrations, a stranger"                          $M -DFILESET -DNMIG=2 -DNOP=1 -DREL1 -DNE=1
  holds "file set, libvirtd, QEMU and flock(1) on the image"          $F -DNOP=2 -DIMAGE -DCONV -DNS=1 -DNC=1 -DNK=1
  holds "file set, an index, any version, three incarnations"         $F -DN=3 -DNOP=1 -DCONV -DINDEX -DOLD
  holds "file set, an index, a libvirtd and a QEMU die"               $F -DNOP=2 -DCONV -DINDEX -DNC=1 -DNK=1
  holds "exclusive to reading, two guests, another, libvirtd dies"    $C -DNOP=2 -DNE=1 -DNCR=1 -DB=1
  holds "lease file, shared guests, one dies"                         $L -DSHARED -DNK=1
  holds "two resources, 2 operations, a QEMU and a libvirtd die"      $R -DNMIG=2 -DNOP=2 -DNK=1 -DNCR=1
  holds "two resources, hot-plug, stranger, a QEMU and a libvirtd die" $R -DNMIG=2 -DNOP=1 -DNHP=2 -DNE=1 -DNK=1 -DNCR=1
fi
wait
show
checks=$(cat "$results"/*)
passed=$(grep -c '^ok ' <<<"$checks") failed=$(grep -c '^FAILED ' <<<"$checks")
# Whatever was started has to say how it ended.
[ $shown = $started ] || { echo "FAILED a check that did not end"; failed=$((failed+started-shown)); }
echo "$passed passed, $failed failed"
[ $failed = 0 ]
