# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The leasehold command looks at an image that a guest of another host has."""

import json

import lab as labs
import pytest


@pytest.fixture
def inspect(leased, hosts, two):
    """inspect(image): what the second host sees. (Its actor brings the command along.)"""
    if leased.name == "smb":
        pytest.skip("no guest can have an image there")
    if not labs.command().exists():
        pytest.skip(f"{labs.command()} was not built")
    host = hosts[1]
    conf = f"{labs.GUEST_DIR}/inspect.conf"

    def look(image):
        host.ok(f"cat >{conf} <<'END'\n{leased.plugin_conf or ''}\nEND")
        # On a busy machine the host may stand still longer than a command waits for its storage by itself.
        inspected, classified = host.ok(f"for verb in inspect classify; do {labs.GUEST_DIR}/leasehold $verb --json"
                                        f" --timeout 120 --config {conf} {image} | tr -d '\\n'; echo; done").splitlines()
        seen, [facts] = json.loads(inspected)["images"][0], json.loads(classified)["paths"]
        assert seen["storage"] == {key: facts[key] for key in seen["storage"]}, "classify says the same"
        assert not [words for words in seen["next"] if "no guest can have it" in words], seen
        return seen
    return look


def test_the_guest_of_another_host_is_named_while_it_lives(leased, inspect, one, hosts):
    image = leased.image()
    assert inspect(image)["leases"] == []
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    [lease] = inspect(image)["leases"]
    # NFSv3 has no extended attributes, so the owner record does not get there.
    known = (None, None) if leased.name == "nfs3" else ("db", hosts[0].ok("uname -n").strip())
    assert (lease["guest"], lease["host"]) == known, lease
    assert (lease["mode"], lease["state"]) == ("exclusive", "held"), lease
    one.ok("release", "db")
    assert inspect(image)["leases"][0]["state"] == "suspended"
    one.ok("kill", "db")
    assert inspect(image)["leases"] == []
