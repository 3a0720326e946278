# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Shared storage for the hosts of a lab: how each kind is set up, and nothing about leases.

The lab has three hosts. h1 and h2 use the storage; h3 serves what needs a server. OCFS2 and GFS2 live on disks that h1
and h2 share. bindfs needs no kernels of its own: there h1 and h2 are namespaces. Storage.ready() brings up what is
missing, also after a host was killed.
"""

import json
import pathlib
import re
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "support"))
from documents import documented  # noqa: E402

SERVER_LEASE = 15  # seconds that an NFSv4 client may be silent; Linux' default is 90
# Seconds that a client may be silent: until others may take what it has for writing (session_timeout), and all the
# same (session_autoclose). The least there may be, and the defaults.
CEPH_PATIENCE, CEPH_DEFAULTS = (30, 30), (60, 300)
CEPH_MDS_GRACE = 15  # seconds until another metadata server takes over; the default
GLUSTER_PATIENCE = 12  # seconds that a client may be silent (server.tcp-user-timeout); the default is 42
DOZEN = 12
OWN_DISK, OCFS2_DISK, GFS2_DISK, FREE_DISK = "/dev/vdb", "/dev/vdc", "/dev/vdd", "/dev/vde"


class Storage:
    name = ""
    has_server = True
    lab_kind = "Lab"
    plugin_conf = None  # what the administrator has to write for leases there

    def __init__(self, lab):
        self.lab = lab
        self.server = lab.hosts[2] if self.has_server else None
        self.clients = lab.hosts[:2]
        self.directory = f"/mnt/{self.name}"
        self.prepared = {}  # host: the process in which it was done
        self.paths, self.volumes = [], []  # that nobody has asked for yet

    def ready(self):
        """Boots what is needed and brings the storage up where it is not."""
        hosts = ([self.server] if self.has_server else []) + self.clients
        self.lab.boot(*hosts)
        for host in hosts:
            if self.prepared.get(host) is not host.process:
                (self.serve if host is self.server else self.mount)(host)
                self.prepared[host] = host.process
        return self

    def serve(self, server):
        raise NotImplementedError

    def mount(self, host):
        raise NotImplementedError

    def actor(self, host):
        return host.actor(self.lab.unique(self.name), self.plugin_conf)

    # A dozen at a time: it takes an emulated processor long to start a program.

    def image(self):
        """A new disk for guests."""
        return self.path()

    def path(self):
        """A new file, 1 MiB, that nobody uses yet."""
        if not self.paths:
            self.paths = [f"{self.directory}/{self.lab.unique('disk')}.img" for _ in range(DOZEN)]
            files = " ".join(self.paths)
            self.clients[0].ok(f"truncate -s 1M {files} && chmod 0666 {files} && sync {files}")
            self.clients[1].ok(f"for file in {files}; do"
                               f" until [ -s $file ]; do sleep 0.1; ls {self.directory} >/dev/null; done; done")
        return self.paths.pop()


def own_disk(host):
    """Its own disk at /srv, for what must outlive a power cut."""
    host.ok(f"mountpoint -q /srv || {{ blkid {OWN_DISK} >/dev/null || mkfs.ext4 -q -F {OWN_DISK}"
            f" && mount {OWN_DISK} /srv; }}")


# --- NFS ----------------------------------------------------------------------------------------------------------


class Nfs(Storage):
    """One server for all versions. Exports: /srv/nfs for everybody, /srv/squashed with root_squash. /srv is version 4's
    root, because the host's own root, an overlay, cannot be exported; below it nfsd looks for exports at mount points
    only."""

    version = exports = ""

    def serve(self, server):
        self.start_statd(server)
        server.ok("""pidof rpc.mountd >/dev/null || {
            mkdir -p /srv/nfs /srv/squashed && chmod 1777 /srv/nfs /srv/squashed &&
            mount --bind /srv/nfs /srv/nfs && mount --bind /srv/squashed /srv/squashed &&
            mkdir -p /var/lib/nfs/rpc_pipefs && mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs &&
            printf '%s\\n' '/srv *(ro,fsid=0,no_subtree_check)' \\
                           '/srv/nfs *(rw,no_root_squash,no_subtree_check,fsid=1)' \\
                           '/srv/squashed *(rw,root_squash,no_subtree_check,fsid=2)' >/etc/exports &&
            modprobe nfsd && { mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd; } &&
            exportfs -ra && rpc.mountd && nfsdcld; }""")
        self.start_nfsd(server, 0)

    @staticmethod
    def start_statd(host):
        """What a host must remember of its peers over a power cut, so that they learn that its locks are void, is on
        its own disk."""
        own_disk(host)
        host.ok("""mountpoint -q /var/lib/nfs || {
            mkdir -p /srv/state/nfsdcld /srv/state/sm /srv/state/sm.bak && mount --bind /srv/state /var/lib/nfs &&
            touch /var/lib/nfs/etab /var/lib/nfs/rmtab /var/lib/nfs/state &&
            chown -R statd /srv/state/sm /srv/state/sm.bak /srv/state/state && rpcbind -w && rpc.statd; }""")

    @staticmethod
    def start_nfsd(server, reclaim_seconds):
        """For so long no lock is given but to those who had it before. 0: there was nobody."""
        server.ok(f"""[ "$(cat /proc/fs/nfsd/threads)" != 0 ] || {{ modprobe lockd &&
            echo {SERVER_LEASE} | tee /proc/fs/nfsd/nfsv4leasetime >/proc/fs/nfsd/nfsv4gracetime &&
            echo {reclaim_seconds or 1} >/proc/sys/fs/nfs/nlm_grace_period && rpc.nfsd -V 3 8; }}""")
        if not reclaim_seconds:
            server.run("echo Y >/proc/fs/nfsd/v4_end_grace")  # EBUSY: it had ended already

    def restart(self):
        """The kernel's NFS server goes and comes; its disk and its notes about clients stay."""
        self.server.ok("rpc.nfsd 0")
        self.start_nfsd(self.server, SERVER_LEASE)
        self.server.ok(shlex.join(documented("sm-notify -f")))

    def mount(self, host):
        self.start_statd(host)
        for export, directory in (("nfs", self.directory), ("squashed", self.squashed_directory)):
            host.ok(f"mountpoint -q {directory} || {{ mkdir -p {directory} && mount -t nfs -o vers={self.version}"
                    f" {self.server.name}:{self.exports}/{export} {directory}; }}", timeout=120)

    @property
    def squashed_directory(self):
        return f"{self.directory}-squashed"


class Nfs42(Nfs):
    name = "nfs42"
    version = "4.2"
    exports = ""


class Nfs3(Nfs):
    name = "nfs3"
    version = "3"
    exports = "/srv"


# --- disks that the hosts share, with lease files on NFS ------------------------------------------------------------


class Devices(Nfs42):
    """Logical volumes of a SCSI disk that h1 calls sdc and h2 sda; h2 has other device numbers for them, too. The other
    two, sda and sdb on h1, sdb and sdc on h2, are free."""

    name = "devices"
    lockspace = "/mnt/nfs42/lockspace"
    plugin_conf = f'lvm_lockspace_dir = "{lockspace}/lvm"\nscsi_lockspace_dir = "{lockspace}/scsi"'
    formatted = False

    def __init__(self, lab):
        super().__init__(lab)
        self.directory = "/mnt/nfs42"

    def mount(self, host):
        super().mount(host)
        host.ok(f"mkdir -p -m 0700 {self.lockspace} {self.lockspace}/lvm {self.lockspace}/scsi && modprobe dm_mod &&"
                " echo 'activation { udev_sync = 0 udev_rules = 0 }' >/etc/lvm/lvm.conf")
        if host is self.clients[1]:
            host.ok("dmsetup create first --notable")
        if not self.formatted:
            host.ok("vgcreate -qq --physicalextentsize 1M lab /dev/sdc")
            self.formatted = True
        host.ok("vgchange -qq -ay lab")

    def image(self):
        if not self.volumes:
            self.volumes = [self.lab.unique("lab/disk") for _ in range(DOZEN)]
            names = " ".join(self.volumes)
            self.clients[0].ok(f"for name in {names}; do lvcreate -qq -Zn -Wn -L 1M -n $name lab || exit 1; done")
            self.clients[1].ok(f"lvchange -qq -ay {names}")
        return f"/dev/{self.volumes.pop()}"

    @property
    def scsi_disk(self):
        """A free disk, as h1 and as h2 calls it. What h2 calls as h1 calls this one is free, too."""
        return "/dev/sdb", "/dev/sdc"


# --- SMB ----------------------------------------------------------------------------------------------------------


class Smb(Storage):
    name = "smb"

    def serve(self, server):
        own_disk(server)
        server.ok("""mkdir -p -m 1777 /srv/smb && cat >/etc/samba/smb.conf <<'END'
[global]
server role = standalone server
disable netbios = yes
load printers = no
log file = /var/log/samba/log
[lab]
path = /srv/smb
read only = no
END
            printf 'lab\\nlab\\n' | smbpasswd -s -a root && smbd -D""")

    def mount(self, host):
        host.ok(f"mkdir -p {self.directory} && mount -t cifs //{self.server.address}/lab {self.directory}"
                f" -o vers=3.1.1,username=root,password=lab", timeout=120)


# --- GlusterFS ----------------------------------------------------------------------------------------------------


class Gluster(Storage):
    """A volume of one brick, on this machine's own kernel; clients and bricks are processes."""

    name = "gluster"
    lab_kind = "MachineLab"
    volume = "lab"
    layout = ""
    bricks = ("lab",)
    options = {"client.strict-locks": "on"}

    def serve(self, server):
        server.ok("mountpoint -q /srv || { mount -t tmpfs tmpfs /srv && glusterd; }", timeout=120)
        server.ok("until gluster --timeout=20 volume list >/dev/null 2>&1; do sleep 0.2; done", timeout=120)
        self.create(self.volume, self.options, self.layout, self.bricks)

    def create(self, volume, options=None, layout="", bricks=None):
        """A volume, if there is none of that name."""
        places = " ".join(f"{self.server.name}:/srv/{brick}" for brick in bricks or [volume])
        options = {"server.tcp-user-timeout": GLUSTER_PATIENCE} | (options or {})
        settings = "".join(f" && gluster volume set {volume} {key} {value}" for key, value in options.items())
        self.server.ok(f"""gluster volume info {volume} >/dev/null 2>&1 || {{
            gluster --mode=script volume create {volume} {layout} {places} force{settings} &&
            gluster volume start {volume}; }}""", timeout=180)

    def set(self, option, word, volume=None):
        self.server.ok(f"gluster volume set {volume or self.volume} {option} {word}", timeout=60)

    def mount(self, host):
        self.mount_at(host, self.volume, self.directory)

    def mount_at(self, host, volume, directory):
        host.ok(f"mkdir -p {directory} && mount -t glusterfs {self.server.name}:/{volume} {directory} &&"
                f" mountpoint -q {directory}", timeout=120)

    def restart_brick(self, brick, volume=None, directory=None):
        """Killed and started again; gives back control when all clients are connected. (A descriptor that is used for the
        first time meanwhile is never really opened, and answers ENOTCONN for good: open-behind.c.)"""
        volume, directory = volume or self.volume, directory or self.directory
        self.server.ok(f"""kill -KILL $(cat /var/run/gluster/vols/{volume}/{self.server.name}-srv-{brick}.pid)
            until gluster volume status {volume} {self.server.name}:/srv/{brick} | grep -q ' N  *N/A'; do
                sleep 0.2; done
            gluster volume start {volume} force""", timeout=180)
        for host in self.clients:
            host.ok(f"""for i in $(seq 600); do
                    said=$(cat {directory}/.meta/graphs/active/{volume}-client-*/private) &&
                        [[ $said == *'connected = 1'* && $said != *'connected = 0'* ]] && exit 0
                    sleep 0.1
                done; exit 1""", timeout=120)


class GlusterReplica(Gluster):
    """Three bricks, of which one has no data (an arbiter)."""

    name = "gluster3"
    volume = "three"
    layout = "replica 3 arbiter 1"
    bricks = ("three1", "three2", "three3")
    plugin_conf = 'storage_locks = [ "/mnt/gluster3=flock" ]'


# --- CephFS -------------------------------------------------------------------------------------------------------


class CephFs(Storage):
    """A cluster without disks on this machine's own kernel: one monitor, one OSD that stores in memory, two metadata
    servers of which one waits, and no manager. Both kinds of client use it, and h1 and h2 have both."""

    name = "cephfs"
    in_kernel = True
    fsid = "6c656173-6568-6f6c-6400-000000000000"
    osd = "6c656173-6568-6f6c-6400-000000000001"

    def __init__(self, lab):
        super().__init__(lab)
        self.server = lab.machine

    @property
    def conf(self):
        return f"""mkdir -p /etc/ceph && cat >/etc/ceph/ceph.conf <<'END'
[global]
fsid = {self.fsid}
mon host = {self.server.address}
auth cluster required = none
auth service required = none
auth client required = none
mon allow pool size one = true
mon warn on pool no redundancy = false
mds beacon grace = {CEPH_MDS_GRACE}
osd pool default size = 1
osd objectstore = memstore
osd crush chooseleaf type = 0
END"""

    def serve(self, server):
        ceph = "timeout 120 ceph"
        server.ok(f"""pidof ceph-mon >/dev/null || {{ {self.conf}
            rm -rf /var/lib/ceph && cd /tmp && rm -f keyring monmap &&
            mkdir -p /var/lib/ceph/mon/ceph-a /var/lib/ceph/osd/ceph-0 /var/lib/ceph/mds/ceph-a /var/lib/ceph/mds/ceph-b \
                /var/log/ceph /run/ceph &&
            ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *' &&
            monmaptool --create --add a {server.address}:6789 --fsid {self.fsid} monmap &&
            ceph-mon --mkfs -i a --monmap monmap --keyring keyring && ceph-mon -i a; }}""")
        # An OSD may greet the monitor before it knows whose it is; then the monitor says "wrong fsid".
        server.ok(f"""pidof ceph-osd >/dev/null || {{ {self.persistently(f"osd create {self.osd}")} &&
            ceph-osd -i 0 --mkfs --osd-uuid {self.osd} &&
            for i in $(seq 10); do ceph-osd -i 0 && exit 0; sleep 0.5; done; exit 1; }}""", timeout=180)
        server.ok(f"""for name in a b; do
                pgrep -f "ceph-mds -i $name" >/dev/null || ceph-mds -i $name || exit 1
            done
            for i in $(seq 120); do
                {ceph} fs ls | grep -q 'name: lab' || {{ {ceph} osd pool create metadata 8 &&
                    {ceph} osd pool create data 8 && {ceph} fs new lab metadata data; }}
                {ceph} mds stat | grep -q up:active && exit 0; sleep 0.5
            done; exit 1""", timeout=600)
        self.be_patient()

    @staticmethod
    def persistently(*orders):
        """Shell words for orders to the cluster. The monitor's answer to who has just come may be EPERM."""
        return " && ".join(f"""{{ for i in $(seq 10); do
                timeout 60 ceph {order} && break; sleep 0.5; [ $i != 10 ]
            done; }}""" for order in orders)

    def cluster(self, order):
        """What it answers to an order."""
        return self.server.ok(f"{{ {self.persistently(order)}; }} 2>/dev/null", timeout=620)

    def mount(self, host):
        # Not by mount.ceph: its place is another one in other releases.
        host.ok(f"{self.conf}\nmodprobe ceph")
        self.mount_at(host, self.directory)

    def mount_at(self, host, directory, options="recover_session=no"):
        host.ok(f"mkdir -p {directory} && mount -i -t ceph {self.server.address}:6789:/ {directory}"
                f" -o name=admin,{options}", timeout=120)

    def be_patient(self, times=CEPH_PATIENCE):
        self.server.ok(self.persistently(*(f"fs set lab {option} {seconds}" for option, seconds in
                                           zip(("session_timeout", "session_autoclose"), times))), timeout=250)

    def add_pool(self, name):
        """For data, in which files lie whose directory says so."""
        self.server.ok(self.persistently(f"osd pool create {name} 8", f"fs add_data_pool lab {name}"), timeout=250)

    def evict(self, host):
        """The host's client, at once: its locks go, and the OSDs take nothing of it any more."""
        for session in json.loads(self.cluster("--format json tell mds.lab:0 session ls")):
            client = session["client_metadata"]
            if client["hostname"] == host.name and ("kernel_version" in client) == self.in_kernel:
                self.cluster(f"tell mds.lab:0 client evict id={session['id']}")

    def restart_mds(self, fails_over):
        """Kills the active one, whose place the other one takes, or both; and starts who is missing."""
        [active] = re.findall("0=([ab])=up:active", self.cluster("mds stat"))
        self.server.ok(f"pkill -KILL -f 'ceph-mds -i {active if fails_over else '[ab]'}'")
        self.serve(self.server)


class CephFuse(CephFs):
    name = "cephfuse"
    in_kernel = False

    def mount(self, host):
        host.ok(f"{self.conf}\nmodprobe fuse && mkdir -p {self.directory} &&"
                f" ceph-fuse --id admin {self.directory}", timeout=120)


# --- a FUSE file system that passes locks on ------------------------------------------------------------------------


class Bindfs(Storage):
    """Two clients of one directory. Their locks meet there, as those of clients of a network file system do on its
    server; the kernel has nothing to do with it."""

    name = "bindfs"
    plugin_conf = 'storage_locks = [ "/mnt/bindfs=flock" ]'
    has_server = False
    lab_kind = "NamespaceLab"

    def mount(self, host):
        source = self.lab.dir / "bindfs"
        host.ok(f"mkdir -p {source} {self.directory} &&"
                f" bindfs --multithreaded --enable-lock-forwarding {source} {self.directory}")


# --- OCFS2 with its own cluster stack (o2cb) ------------------------------------------------------------------------


class Ocfs2(Storage):
    name = "ocfs2"
    has_server = False
    formatted = False

    def mount(self, host):
        nodes = "".join(f"node:\n\tip_port = 7777\n\tip_address = {node.address}\n\tnumber = {node.number}\n"
                        f"\tname = {node.name}\n\tcluster = lab\n\n" for node in self.clients)
        host.ok(f"cat >/etc/ocfs2/cluster.conf <<'END'\n{nodes}cluster:\n\tnode_count = {len(self.clients)}\n"
                "\theartbeat_mode = local\n\tname = lab\nEND\n"
                "modprobe -a ocfs2_stack_o2cb ocfs2 && o2cb register-cluster lab")
        if not self.formatted:
            host.ok(f"mkfs.ocfs2 -q -N 2 -J size=4M --cluster-stack=o2cb --cluster-name=lab {OCFS2_DISK}", timeout=120)
            self.formatted = True
        host.ok(f"mkdir -p {self.directory} && mount -t ocfs2 {OCFS2_DISK} {self.directory}", timeout=180)


# --- corosync and dlm_controld, and what runs on them ---------------------------------------------------------------


class OnDlm(Storage):
    has_server = False
    formatted = False

    def start_cluster(self, host):
        nodes = "".join(f"node {{\nname: {node.name}\nnodeid: {node.number}\nring0_addr: {node.address}\n}}\n"
                        for node in self.clients)
        # Slow, shared CPUs: a token that is late is no dead host.
        host.ok(f"""pidof dlm_controld >/dev/null || {{ cat >/etc/corosync/corosync.conf <<'END'
totem {{
version: 2
cluster_name: lab
transport: udpu
token: 15000
}}
nodelist {{
{nodes}}}
quorum {{
provider: corosync_votequorum
two_node: 1
wait_for_all: 0
}}
END
            modprobe dlm && mkdir -p /dev/misc /etc/dlm &&
            for node in dlm-control dlm-monitor dlm_plock; do ln -sf ../$node /dev/misc/; done &&
            echo enable_fencing=0 >/etc/dlm/dlm.conf && corosync &&
            until corosync-quorumtool -s | grep -q 'Quorate: *Yes'; do sleep 0.5; done && dlm_controld &&
            until dlm_tool status >/dev/null; do sleep 0.5; done; }}""", timeout=120)


class Gfs2(OnDlm):
    name = "gfs2"

    def mount(self, host):
        self.start_cluster(host)
        if not self.formatted:
            host.ok(f"mkfs.gfs2 -q -O -p lock_dlm -t lab:shared -j 2 -J 8 {GFS2_DISK}", timeout=120)
            self.formatted = True
        host.ok(f"modprobe gfs2 && mkdir -p {self.directory} &&"
                f" mount -t gfs2 {GFS2_DISK} {self.directory}", timeout=180)


class Ocfs2Pcmk(OnDlm):
    """A kernel has one OCFS2 cluster stack at a time: not in one run with the other."""

    name = "ocfs2pcmk"

    def mount(self, host):
        self.start_cluster(host)
        host.ok("modprobe -a ocfs2_stack_user ocfs2 && echo pcmk >/sys/fs/ocfs2/cluster_stack")
        if not self.formatted:
            host.ok(f"mkfs.ocfs2 -q -N 2 -J size=4M --cluster-stack=pcmk --cluster-name=lab {OCFS2_DISK}", timeout=120)
            self.formatted = True
        host.ok(f"mkdir -p {self.directory} && mount -t ocfs2 {OCFS2_DISK} {self.directory}", timeout=180)


KINDS = {kind.name: kind for kind in (Nfs42, Nfs3, Ocfs2, Ocfs2Pcmk, Gfs2, Devices, CephFs, CephFuse, Bindfs, Smb, Gluster,
                                      GlusterReplica)}
