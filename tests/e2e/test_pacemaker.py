# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""OPERATIONS.md, "Pacemaker": a cluster of one node, with corosync, Pacemaker and its agent VirtualDomain, on a host."""

import contextlib
import os
import pathlib
import shutil

import expect
import hosts
import pytest
from documents import documented

AGENT = pathlib.Path("/usr/lib/ocf/resource.d/heartbeat/VirtualDomain")

pytestmark = [pytest.mark.skipif(not AGENT.exists() or not all(map(shutil.which, ("pacemakerd", "crm_mon", "corosync"))),
                                 reason="Debian's resource-agents, pacemaker, pacemaker-cli-utils or corosync is not installed"),
              pytest.mark.skipif(hosts.lock_manager() != "leasehold", reason="about leasehold's leases")]

COROSYNC = """\
totem {{
    version: 2
    cluster_name: leasehold
    transport: udpu
}}
nodelist {{
    node {{
        ring0_addr: 127.0.0.1
        name: {node}
        nodeid: 1
    }}
}}
quorum {{
    provider: corosync_votequorum
}}
logging {{
    to_stderr: yes
    to_syslog: no
}}
"""

# As pcs and crmsh would make it: with the times that the agent itself asks for. Nobody is there to fence, or to wait for.
CLUSTER = """\
<cib validate-with="pacemaker-3.0" admin_epoch="0" epoch="1" num_updates="0"><configuration>
<crm_config><cluster_property_set id="options"><nvpair id="fencing" name="stonith-enabled" value="false"/>
<nvpair id="election" name="dc-deadtime" value="1s"/></cluster_property_set></crm_config><nodes/>
<resources><primitive id="{guest}" class="ocf" provider="heartbeat" type="VirtualDomain">
<instance_attributes id="parameters"><nvpair id="config" name="config" value="{config}"/>
<nvpair id="hypervisor" name="hypervisor" value="{uri}"/><nvpair id="force_stop" name="force_stop" value="1"/>
</instance_attributes><operations><op id="start" name="start" interval="0" timeout="90s"/>
<op id="stop" name="stop" interval="0" timeout="90s"/><op id="monitor" name="monitor" interval="10s" timeout="30s"/>
</operations></primitive></resources><constraints/></configuration><status/></cib>
"""

# In namespaces of its own: what is written stays in memory, sockets have names that others may use, too, and the end of
# this shell ends all.
START = """set -eu
ip link set lo up
mkdir -p /run/resource-agents
for folder in /dev/shm /var/lib/corosync /var/lib/pacemaker /run/resource-agents; do mount -t tmpfs tmpfs $folder; done
mkdir /var/lib/pacemaker/{cib,pengine,cores,blackbox}
cp cib.xml /var/lib/pacemaker/cib
chown -R hacluster:haclient /var/lib/pacemaker
chmod 600 /var/lib/pacemaker/cib/cib.xml
mount --bind corosync.conf /etc/corosync/corosync.conf
install -m 666 /dev/null log
corosync -f &
until corosync-cfgtool -s >/dev/null 2>&1; do sleep 0.1; done
PCMK_logfile=$PWD/log PCMK_logfacility=none pacemakerd &
touch begun
wait
"""


class Cluster:
    def __init__(self, host, folder):
        self.host, self.folder = host, folder

    @contextlib.contextmanager
    def running(self, resource):
        config = self.folder / "guest.xml"
        config.write_text(resource.xml().replace("<name>", "\n<name>").replace("</name>", "</name>\n"))  # the agent uses grep
        (self.folder / "corosync.conf").write_text(COROSYNC.format(node=self.host.name))
        (self.folder / "cib.xml").write_text(CLUSTER.format(guest=resource.name, config=config, uri=self.host.uri))
        process = self.host.spawn("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation",
                                  "private", "bash", "-c", f"cd {self.folder}\n{START}", log="cluster.log")
        try:
            hosts.wait_until((self.folder / "begun").exists, "corosync answers")
            self.init = hosts.only_child(hosts.only_child(process.pid))
            yield self
        finally:
            with contextlib.suppress(ProcessLookupError, ValueError):
                hosts.kill_and_wait(hosts.only_child(process.pid))
            process.wait()

    def run(self, *command):
        return hosts.run("nsenter", "-t", self.init, "-m", "-n", "-u", "-p", *command)

    def typed(self, command, **places):
        """A printed command, typed on its node."""
        return self.run(*documented(command, **places))

    def wait(self):
        """Until nothing is left to do."""
        assert (idle := self.run("crm_resource", "--wait")), idle

    def fails(self):
        """Waits for a failed start, and gives what an administrator sees then."""
        def state():
            shown = self.typed("crm_mon -1 -r -f").out
            return "fail-count=1000000" in shown and "Stopped" in shown and shown
        try:
            shown = hosts.wait_until(state, "a start has failed")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.typed('crm_mon -1 -r -f')}\n{(self.folder / 'log').read_text()}") from None
        self.wait()
        return shown

    def tries_again(self, resource):
        """Pacemaker 2.1.5 says now and then that it has cleaned up, and has counted the same failure once more."""
        def refusals():
            return (self.folder / "log").read_text().count("in use by")
        before = refusals()

        def tried():
            assert (result := self.typed("crm_resource --resource GUEST --cleanup", GUEST=resource.name)), result
            self.wait()
            return refusals() > before
        hosts.wait_until(tried, "it was tried once more")


def test_the_agent_asks_for_the_time_that_a_start_may_take():
    said = hosts.ok(AGENT, "meta-data", env={**os.environ, "OCF_ROOT": "/usr/lib/ocf"})
    assert '<action name="start" timeout="90s"' in said, said


@pytest.mark.waits
def test_a_refusal_is_a_failed_start_and_bans_the_guest_until_that_expires(alpha, beta, image, images, guest):
    disk = image()
    holder, resource = guest(disk), guest(disk)
    beta.start_guest(holder)
    with Cluster(alpha, images).running(resource) as cluster:
        assert f"Failed to start virtual domain {resource.name}" in cluster.fails()
        log = dict(_var_log_pacemaker_pacemaker_log=images / "log")
        expect.names_holder(cluster.typed("grep 'in use by' /var/log/pacemaker/pacemaker.log", **log).out, disk, holder, beta)
        cluster.tries_again(resource)
        cluster.fails()
        beta.destroy(holder)
        assert (result := cluster.typed(
            "crm_resource --resource GUEST --meta --set-parameter failure-timeout --parameter-value 120s",
            GUEST=resource.name, **{"120s": "1s"})), result
        alpha.wait_state(resource, "running")
        expect.taken(beta, disk, by=(resource, alpha))
