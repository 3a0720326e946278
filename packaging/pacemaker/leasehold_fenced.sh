#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# An example of a Pacemaker alert agent: when a node was fenced, the storage is told that it is dead, so that its guests
# can start elsewhere. Every node runs it; to be told twice does no harm. On all nodes:
#
#   install -m 0755 leasehold_fenced.sh /usr/local/lib/
#   echo 'hacluster ALL = (root) NOPASSWD: /usr/sbin/leasehold fenced *' >/etc/sudoers.d/leasehold
#
# because alert agents run as the user hacluster, and on one of them:
#
#   pcs alert create id=leasehold path=/usr/local/lib/leasehold_fenced.sh
#
# Pacemaker does not wait for alert agents: a guest that it starts before the storage has been told is refused, and
# tried again with failure-timeout and migration-threshold. A node's name has to be what the node calls itself.

set -eu

# Only what has succeeded (Pacemaker Administration, "Alert agents"). "on" and "monitor" fence nobody.
[ "${CRM_alert_kind:-}" = fencing ] && [ "${CRM_alert_rc:-}" = 0 ] || exit 0
case "${CRM_alert_task:-}" in
off | reboot) ;;
*) exit 0 ;;
esac
[ "$CRM_alert_node" != "$(uname -n)" ] || exit 0

result=0
said=$(sudo -n leasehold fenced --i-made-sure-it-is-off "$CRM_alert_node" 2>&1) || result=$?
logger -t leasehold "fenced '$CRM_alert_node', exit status $result: $said"
exit "$result"
