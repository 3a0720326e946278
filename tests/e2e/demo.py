#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""leasehold's main job, played through on this machine: two hosts (a stock libvirtd each, in its own namespaces), one
image, real QEMU. Prints every virsh command with its answer. Exit 0 only if everything behaved as it says.

    sudo tests/e2e/demo.py          needs build/plugin/leasehold.so, or LEASEHOLD_PLUGIN_DIR"""

import sys
import textwrap

import expect
import hosts


def say(text):
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def play(host, *words, succeeds=True, shown=None):
    """Runs virsh and shows it as an operator of that host would see it."""
    result = host.virsh(*words)
    text = (result.out + result.err).strip().replace(str(host.lab.dir), "/shared")
    command = shown or " ".join(map(str, words))
    print(f"{host.name}$ virsh {command}".replace(str(host.lab.dir), "/shared"))
    if text:
        print(textwrap.indent(text, "    "), flush=True)
    assert bool(result) == succeeds, f"this should have been {'done' if succeeds else 'refused'}: {result}"
    return result.err


def walk(lab):
    alpha, beta = lab.host("alpha"), lab.host("beta")
    disk = lab.image(lab.dir / "db.img")
    db = hosts.Guest("db", [hosts.Disk(disk, "vda")], serial=lab.dir / "db.serial")
    copy = hosts.Guest("copy-of-db", [hosts.Disk(disk, "vda")])
    alpha.define(db)
    beta.define(copy)

    say('Two hosts with lock_manager = "leasehold", one shared directory, one image. Guest "db" starts on alpha:')
    play(alpha, "start", db.name)
    expect.leased(disk)

    say("Another guest with the same image is refused on beta, and told who has it:")
    expect.names_holder(play(beta, "start", copy.name, succeeds=False), disk, db, alpha)

    say("A suspended guest keeps its image:")
    play(alpha, "suspend", db.name)
    play(beta, "start", copy.name, succeeds=False)
    play(alpha, "resume", db.name)

    say("libvirtd on alpha is killed. The lease lives in QEMU, nothing changes:")
    alpha.kill_libvirtd()
    print("alpha$ kill -9 $(pidof libvirtd)")
    expect.names_holder(play(beta, "start", copy.name, succeeds=False), disk, db, alpha)
    alpha.start_libvirtd()
    print("alpha$ libvirtd --daemon")

    say("Live migration to beta. While it copies RAM, and after it, the image is never anybody's but db's:")
    hosts.wait_until(lambda: db.said("R"), "db has booted")
    migration = alpha.slow_migration(beta, db)
    print(f"alpha$ virsh migrate --live {db.name} qemu+ssh://beta/system &")
    play(beta, "start", copy.name, succeeds=False)
    alpha.hurry(db)
    out, err = migration.communicate(timeout=hosts.PATIENCE)
    assert migration.returncode == 0, err
    play(beta, "domstate", db.name)
    alpha.define(copy)
    expect.names_holder(play(alpha, "start", copy.name, succeeds=False), disk, db, beta)

    say("Its QEMU ends, and the image is free at that moment:")
    play(beta, "destroy", db.name)
    expect.not_leased(disk)
    play(alpha, "start", copy.name)
    play(alpha, "destroy", copy.name)


def main():
    try:
        lab = hosts.Lab()
    except hosts.Missing as missing:
        sys.exit(f"The demo cannot run here: {missing}")
    try:
        walk(lab)
        for host in lab.running_hosts():
            host.clean()
    finally:
        lab.close()
    say("All of it behaved.")


if __name__ == "__main__":
    main()
