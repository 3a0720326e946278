// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#ifndef __clang__ // GCC 12 takes std::regex for uninitialized under the sanitizers (GCC bug 105562)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "core/settings.hpp"

#include "tests/support/built.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <iterator>
#include <regex>
#include <sstream>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

using namespace std::chrono_literals;
using namespace std::string_literals;

namespace leasehold {
namespace {

using Outsiders = Settings::Outsiders;
using Unleased = Settings::Unleased;

Settings parse(std::string_view text) {
    return parseSettings(text, "a.conf");
}

std::string complaintAbout(std::string_view text) {
    try {
        parse(text);
    } catch (const SettingsError& error) {
        return error.what();
    }
    return "nothing was wrong";
}

std::string complaintAboutFile(const std::string& path) {
    try {
        loadSettings(path);
    } catch (const SettingsError& error) {
        return error.what();
    }
    return "nothing was wrong";
}

std::string contentOf(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

std::string shippedFile() {
    return support::built("conf/qemu-leasehold.conf");
}

std::string shippedWithEveryOptionUncommented() {
    std::istringstream lines(contentOf(shippedFile()));
    std::string result;
    for (std::string line; std::getline(lines, line);)
        result += std::regex_replace(line, std::regex("^#(?=[a-z])"), "") + "\n";
    return result;
}

class SettingsFile : public testing::Test {
protected:
    SettingsFile() {
        char name[] = "/tmp/leasehold-settings-XXXXXX";
        if (!mkdtemp(name))
            std::abort();
        directory_ = name;
    }
    ~SettingsFile() override { std::filesystem::remove_all(directory_); }

    std::string path() const { return directory_ + "/a.conf"; }
    void write(std::string_view text) const { std::ofstream(path()) << text; }

    std::string directory_;
};

TEST(Settings, EmptyTextMeansTheDefaults) {
    const Settings settings = parse("");
    EXPECT_TRUE(settings.autoDiskLeases);
    EXPECT_TRUE(settings.leaseBackingFiles);
    EXPECT_FALSE(settings.requireLeaseForDisks);
    EXPECT_EQ(settings.handoffWait, 5s);
    EXPECT_EQ(settings.guestsWithoutLease, Unleased::refuse);
    EXPECT_EQ(settings.outsiders, Outsiders::refuse);
    EXPECT_EQ(settings, Settings());
}

TEST(Settings, EveryOptionIsRead) {
    const Settings settings = parse("auto_disk_leases = 0\n"
                                    "require_lease_for_disks = 0\n"
                                    "handoff_wait = 17\n"
                                    "guests_without_lease = \"allow\"\n"
                                    "qemu_locks = \"warn\"\n"
                                    "require_cluster_leases = 1\n"
                                    "single_host = 1\n"
                                    "host_devices = 'warn'\n"
                                    "device_layers = 0\n"
                                    "lease_backing_files = 0\n");
    EXPECT_FALSE(settings.autoDiskLeases);
    EXPECT_FALSE(settings.requireLeaseForDisks);
    EXPECT_EQ(settings.handoffWait, 17s);
    EXPECT_EQ(settings.guestsWithoutLease, Unleased::allow);
    EXPECT_EQ(settings.outsiders, Outsiders::warn);
    EXPECT_TRUE(settings.requireClusterLeases);
    EXPECT_FALSE(settings.leaseBackingFiles);
    EXPECT_TRUE(settings.singleHost);
    EXPECT_EQ(settings.hostDevices, Outsiders::warn);
    EXPECT_FALSE(settings.deviceLayers);
    EXPECT_EQ(parse("qemu_locks = \"ignore\"").outsiders, Outsiders::ignore);
}

TEST(Settings, LeasesAreRequiredExactlyWhenTheyAreNotAutomaticUnlessTheFileSaysOtherwise) {
    EXPECT_TRUE(parse("auto_disk_leases = 0").requireLeaseForDisks);
    EXPECT_FALSE(parse("auto_disk_leases = 1").requireLeaseForDisks);
    EXPECT_TRUE(parse("auto_disk_leases = 1\nrequire_lease_for_disks = 1").requireLeaseForDisks);
    EXPECT_FALSE(parse("require_lease_for_disks = 0\nauto_disk_leases = 0").requireLeaseForDisks);
}

TEST(Settings, SyntaxIsThatOfLibvirtsOwnFiles) {
    const char* const kSpellings[] = {
        "handoff_wait = 7",
        "handoff_wait=7",
        "\t handoff_wait \t=\t 7 \t",
        "handoff_wait = 7 # a remark",
        "handoff_wait = 7#a remark",
        "handoff_wait = +7",
        "handoff_wait = 007\n",
        "\n\n# a remark\n   # another\nhandoff_wait = 7\n\n",
        "handoff_wait = 7; qemu_locks = \"warn\"",
        "handoff_wait = 7;\nqemu_locks = 'warn'",
        "handoff_wait = 7\nqemu_locks = \"\"\"warn\"\"\"",
        "handoff_wait = 7\nqemu_locks = 'warn'# a remark with 'quotes\"",
    };
    for (const std::string text : kSpellings)
        EXPECT_NO_THROW(EXPECT_EQ(parse(text).handoffWait, 7s) << text) << text;
    EXPECT_EQ(parse("handoff_wait = 7; qemu_locks = \"warn\"").outsiders, Outsiders::warn);
}

TEST(Settings, LinesMayEndInTheMannerOfWindows) {
    EXPECT_EQ(parse("# a remark\r\nhandoff_wait = 7\r\nqemu_locks = 'warn'\r\n").outsiders, Outsiders::warn);
    EXPECT_EQ(complaintAbout("\r\n\r\nhandoff_wait = 99\r\n"),
              "a.conf:3: handoff_wait: found 99; write a whole number of seconds from 0 to 60");
}

TEST(Settings, ByteOrderMarkAtTheBeginningIsSkipped) {
    EXPECT_EQ(parse("\xef\xbb\xbfhandoff_wait = 7").handoffWait, 7s);
    EXPECT_EQ(parse("\xef\xbb\xbf"), Settings());
    EXPECT_EQ(complaintAbout("\n\xef\xbb\xbfhandoff_wait = 7"),
              "a.conf:2: \\xef\\xbb\\xbfhandoff_wait: unknown option; did you mean \"handoff_wait\"?");
}

TEST(Settings, UnknownKeyNamesFileLineAndTheNearestOption) {
    EXPECT_EQ(complaintAbout("# a remark\n\nauto_disk_lease = 1\n"),
              "a.conf:3: auto_disk_lease: unknown option; did you mean \"auto_disk_leases\"?");
    EXPECT_EQ(complaintAbout("require-leases-for-disks = 1"),
              "a.conf:1: require-leases-for-disks: unknown option; did you mean \"require_lease_for_disks\"?");
    EXPECT_EQ(complaintAbout("Handoff_Wait: 1"),
              "a.conf:1: Handoff_Wait:: unknown option; did you mean \"handoff_wait\"?");
    EXPECT_EQ(complaintAbout("\"qemu_locks\" = 'warn'"),
              "a.conf:1: \"qemu_locks\": unknown option; did you mean \"qemu_locks\"?");
}

TEST(Settings, UnknownKeyThatResemblesNothingIsAnsweredWithAllOptions) {
    EXPECT_EQ(complaintAbout("user = \"root\""),
              "a.conf:1: user: unknown option; the options are auto_disk_leases, require_lease_for_disks, "
              "handoff_wait, storage_timeout, guests_without_lease, qemu_locks, file_lockspace_dir, "
              "lvm_lockspace_dir, scsi_lockspace_dir, require_cluster_leases, single_host, host_devices, "
              "device_layers, lease_backing_files, storage_locks, image_user, image_group");
}

TEST(Settings, LockspaceDirectoriesAreAbsolutePathsOrNone) {
    EXPECT_EQ(parse("file_lockspace_dir = '/leases'").fileLockspaceDir, "/leases");
    EXPECT_EQ(parse("lvm_lockspace_dir = \"/lvm\"").lvmLockspaceDir, "/lvm");
    EXPECT_EQ(parse("scsi_lockspace_dir = ''").scsiLockspaceDir, "");
    EXPECT_EQ(complaintAbout("scsi_lockspace_dir = \"leases\""),
              "a.conf:1: scsi_lockspace_dir: found the string \"leases\"; write the absolute path of a directory, in "
              "quotes");
}

TEST(Settings, AccountsAreNamesOrNumbersOfThisHost) {
    EXPECT_EQ(parse("image_user = 'root'").imageUser, uid_t{0});
    EXPECT_EQ(parse("image_group = '+107'").imageGroup, gid_t{107});
    EXPECT_EQ(parse("image_user = ''").imageUser, std::nullopt);
    for (const std::string bad : {"'no-such-user'", "'+'", "'+12x'", "'+4294967295'", "'+99999999999'", "107"})
        EXPECT_NE(complaintAbout("image_user = " + bad).find("image_user: found "), std::string::npos) << bad;
}

TEST(Settings, StorageLocksAreAListOfPathsWithLocks) {
    using storage::LockKind, storage::Override, storage::Scope;
    EXPECT_EQ(parse("storage_locks = [ \"/mnt/a=ofd\", '/mnt/b=flock' ]").storageLocks,
              (std::vector<Override>{{"/mnt/a", LockKind::byteRange, Scope::allHosts},
                                     {"/mnt/b", LockKind::flock, Scope::allHosts}}));
    EXPECT_TRUE(parse("storage_locks = []").storageLocks.empty());
    for (const std::string bad : {"'/mnt/a=ofd'", "[ 1 ]", "[ '/mnt/a' ]", "[ '/mnt/a=lockd' ]", "[ 'mnt=ofd' ]"})
        EXPECT_NE(complaintAbout("storage_locks = " + bad).find("storage_locks: found "), std::string::npos) << bad;
}

TEST(Settings, OptionSetTwiceNamesBothLines) {
    EXPECT_EQ(complaintAbout("handoff_wait = 1\n\nhandoff_wait = 1\n"),
              "a.conf:3: handoff_wait: set a second time; keep either this line or line 1");
}

TEST(Settings, WrongValueIsAnsweredWithWhatWasFoundAndWhatIsAllowed) {
    struct {
        std::string text, complaint;
    } const kCases[] = {
        {"auto_disk_leases = 2", "auto_disk_leases: found 2; write 0 (no) or 1 (yes)"},
        {"auto_disk_leases = -1", "auto_disk_leases: found -1; write 0 (no) or 1 (yes)"},
        {"auto_disk_leases = yes", "auto_disk_leases: found yes; write 0 (no) or 1 (yes)"},
        {"auto_disk_leases = \"1\"", "auto_disk_leases: found the string \"1\"; write 0 (no) or 1 (yes)"},
        {"auto_disk_leases =", "auto_disk_leases: found no value; write 0 (no) or 1 (yes)"},
        {"auto_disk_leases = # 1", "auto_disk_leases: found no value; write 0 (no) or 1 (yes)"},
        {"auto_disk_leases =\n1", "auto_disk_leases: found no value; write 0 (no) or 1 (yes)"},
        {"auto_disk_leases = [ 1 ]", "auto_disk_leases: found a list of 1; write 0 (no) or 1 (yes)"},
        {"handoff_wait = 61", "handoff_wait: found 61; write a whole number of seconds from 0 to 60"},
        {"handoff_wait = -5", "handoff_wait: found -5; write a whole number of seconds from 0 to 60"},
        {"handoff_wait = 2.5", "handoff_wait: found 2.5; write a whole number of seconds from 0 to 60"},
        {"handoff_wait = 5s", "handoff_wait: found 5s; write a whole number of seconds from 0 to 60"},
        {"handoff_wait = 0x5", "handoff_wait: found 0x5; write a whole number of seconds from 0 to 60"},
        {"handoff_wait = +-5", "handoff_wait: found +-5; write a whole number of seconds from 0 to 60"},
        {"handoff_wait = -", "handoff_wait: found -; write a whole number of seconds from 0 to 60"},
        {"handoff_wait = +", "handoff_wait: found +; write a whole number of seconds from 0 to 60"},
        {"guests_without_lease = refuse", "guests_without_lease: found refuse; write \"refuse\" or \"allow\""},
        {"guests_without_lease = \"\"", "guests_without_lease: found the string \"\"; write \"refuse\" or \"allow\""},
        {"qemu_locks = \"Warn\"", "qemu_locks: found the string \"Warn\"; write \"refuse\" or \"warn\" or \"ignore\""},
        {"qemu_locks = 1", "qemu_locks: found 1; write \"refuse\" or \"warn\" or \"ignore\""},
        {"qemu_locks = \"\"\"warn\n\"\"\"",
         "qemu_locks: found the string \"warn\\x0a\"; write \"refuse\" or \"warn\" or \"ignore\""},
        {"qemu_locks = [ \"warn\", 'refuse',\n\n +1, \"\"\"a\nb\"\"\" , ]",
         "qemu_locks: found a list of the string \"warn\", the string \"refuse\", +1, the string \"a\\x0ab\"; write "
         "\"refuse\" or \"warn\" or \"ignore\""},
    };
    for (const auto& [text, complaint] : kCases)
        EXPECT_EQ(complaintAbout("\n" + text + "\n"), "a.conf:2: " + complaint);
}

TEST(Settings, BoundsOfTheHandoffWaitAreAllowedThemselves) {
    EXPECT_EQ(parse("handoff_wait = 0").handoffWait, 0s);
    EXPECT_EQ(parse("handoff_wait = 60").handoffWait, 60s);
}

TEST(Settings, NumberThatOverflowsIsNotTakenForASmallOne) {
    // 2^64 + 1 and 2^32 + 1: a wrapped number would be the allowed 1.
    EXPECT_NE(complaintAbout("auto_disk_leases = 18446744073709551617").find("found 18446744073709551617;"),
              std::string::npos);
    EXPECT_NE(complaintAbout("auto_disk_leases = 4294967297").find("found 4294967297;"), std::string::npos);
    EXPECT_NE(complaintAbout("handoff_wait = " + std::string(100'000, '9')).find("999...;"), std::string::npos);
}

TEST(Settings, CommentsMayStandInALongList) {
    const Settings settings = parse("storage_locks = [ # what we know better\n  '/mnt/a=ofd', # the cluster\n"
                                    "# \"/mnt/gone=ofd\",\n  \"/mnt/b=flock\", # its comma\n]\n");
    ASSERT_EQ(settings.storageLocks.size(), 2u);
    EXPECT_EQ(settings.storageLocks[1], storage::parseOverride("/mnt/b=flock"));
}

TEST(Settings, BrokenSyntaxNamesTheLineWhereItBegins) {
    struct {
        std::string text, complaint;
    } const kCases[] = {
        {"qemu_locks = \"warn\nhandoff_wait = 1", "2: qemu_locks: the string is not closed; write \" at its end"},
        {"qemu_locks = \"warn\n\"", "2: qemu_locks: the string is not closed; write \" at its end"},
        {"qemu_locks = 'warn", "2: qemu_locks: the string is not closed; write ' at its end"},
        {"qemu_locks = \"warn\r\n\"", "2: qemu_locks: the string is not closed; write \" at its end"},
        {"qemu_locks = \"", "2: qemu_locks: the string is not closed; write \" at its end"},
        {"qemu_locks = \"\"\"warn\n\n\n\"\"", "2: qemu_locks: the string is not closed; write \"\"\" at its end"},
        {"qemu_locks = [ 'a',\n\n", "2: qemu_locks: the list is not closed; write ] after its last value"},
        {"qemu_locks = [", "2: qemu_locks: the list is not closed; write ] after its last value"},
        {"qemu_locks = [ 'a'\n'b' ]", "3: qemu_locks: found 'b' ] inside the list; write , or ] before it"},
        {"qemu_locks = [\n\n'a',, ]", "4: qemu_locks: found , ] inside the list; write strings or numbers only"},
        {"qemu_locks = [\n[ 1 ] ]", "3: qemu_locks: found [ 1 ] ] inside the list; write strings or numbers only"},
        {"qemu_locks = [ 'a' # b\n'c' ]", "3: qemu_locks: found 'c' ] inside the list; write , or ] before it"},
        {"qemu_locks = [ # a", "2: qemu_locks: the list is not closed; write ] after its last value"},
        {"qemu_locks = [ 'a',\n'b", "3: qemu_locks: the string is not closed; write ' at its end"},
        {"handoff_wait", "2: handoff_wait: there is no = after the name; write handoff_wait = VALUE"},
        {"handoff_wait 5", "2: handoff_wait: there is no = after the name; write handoff_wait = VALUE"},
        {"handoff_wait = 5 6", "2: handoff_wait: found 6 after the value; end the line before it, or put a # there"},
        {"qemu_locks = 'warn' or 'ignore'",
         "2: qemu_locks: found or 'ignore' after the value; end the line before it, or put a # there"},
        {"handoff_wait == 5", "2: handoff_wait: found =; write a whole number of seconds from 0 to 60"},
        {"= 5", "2: an option's name is missing; write NAME = VALUE"},
        {"handoff_wait = 5;;", "2: an option's name is missing; write NAME = VALUE"},
    };
    for (const auto& [text, complaint] : kCases) {
        const std::string got = complaintAbout("\n" + text);
        EXPECT_EQ(got.substr(0, std::string("a.conf:" + complaint).size()), "a.conf:" + complaint) << text;
    }
}

TEST(Settings, LinesInsideAMultiLineStringAreCounted) {
    // A list goes on after such a string, so a mistake behind it shows how far the count has come.
    EXPECT_EQ(complaintAbout("qemu_locks = [ \"\"\"a\n\n\"\"\"\n x'y ' ]").substr(0, 9), "a.conf:4:");
}

TEST(Settings, NulByteIsRefusedWithItsLineWhereverItStands) {
    const std::string complaint = "there is a NUL byte; save the file as plain UTF-8 text";
    EXPECT_EQ(complaintAbout("# a\0 remark\n"s), "a.conf:1: " + complaint);
    EXPECT_EQ(complaintAbout("handoff_wait = 5\n\nqemu_locks = \"warn\0\""s), "a.conf:3: " + complaint);
    EXPECT_EQ(complaintAbout("\xff\xfeh\0a\0"s), "a.conf:1: " + complaint);
}

TEST(Settings, MessageIsShortPrintableAsciiWhateverStandsInTheFile) {
    const std::string garbage[] = {
        std::string(500'000, '['),
        std::string(500'000, 'a') + "=1",
        "qemu_locks = " + std::string(500'000, '['),
        "qemu_locks = '" + std::string(500'000, '\xff') + "'",
        "qemu_locks = 'warn' " + std::string(500'000, '\x1b'),
        "\x1b[31m\xff\x80 = 1",
        "qemu_locks = \"\x1b]0;owned\x07\"",
    };
    for (const std::string& text : garbage) {
        const std::string complaint = complaintAbout(text);
        EXPECT_EQ(complaint.substr(0, 9), "a.conf:1:");
        EXPECT_LT(complaint.size(), 600U);
        EXPECT_EQ(complaint.find_first_not_of(" !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_"
                                              "`abcdefghijklmnopqrstuvwxyz{|}~"),
                  std::string::npos)
            << complaint;
    }
}

TEST(Settings, CommentsMayHoldAnything) {
    EXPECT_EQ(parse("# \xff\xfe \x1b \" ' [ \"\"\"\nhandoff_wait = 7 # \xff ] ' \"\n").handoffWait, 7s);
}

TEST(ShippedConfiguration, ChangesNothingAsItIs) {
    EXPECT_EQ(loadSettings(shippedFile()), Settings());
    EXPECT_FALSE(contentOf(shippedFile()).empty());
}

TEST(ShippedConfiguration, ShowsTheBuiltInDefaults) {
    EXPECT_EQ(parse(shippedWithEveryOptionUncommented()), Settings());
}

TEST(ShippedConfiguration, ShowsEveryOptionThatExists) {
    const std::string kBefore = "the options are ";
    const std::string complaint = complaintAbout("no_such_thing_at_all = 1");
    std::string names = complaint.substr(complaint.find(kBefore) + kBefore.size());
    const std::string shipped = shippedWithEveryOptionUncommented();
    const std::regex name("[a-z_]+");
    int count = 0;
    for (std::sregex_iterator each(names.begin(), names.end(), name); each != std::sregex_iterator(); ++each, count++)
        EXPECT_NE(shipped.find("\n" + each->str() + " = "), std::string::npos) << each->str();
    EXPECT_GE(count, 5);
}

TEST_F(SettingsFile, ThatIsMissingMeansTheDefaults) {
    EXPECT_EQ(loadSettings(path()), Settings());
    EXPECT_EQ(loadSettings(directory_ + "/no/such/directory/a.conf"), Settings());
}

TEST_F(SettingsFile, IsReadAndNamedInMessages) {
    write("handoff_wait = 7\n");
    EXPECT_EQ(loadSettings(path()).handoffWait, 7s);
    write("handoff_wait = 7\nqemu_lock = 'warn'\n");
    EXPECT_EQ(complaintAboutFile(path()), path() + ":2: qemu_lock: unknown option; did you mean \"qemu_locks\"?");
}

TEST_F(SettingsFile, ThatIsNoRegularFileIsRefusedWithoutWaiting) {
    const std::string advice = "; put it right, or remove the file to get the defaults";
    EXPECT_EQ(complaintAboutFile(directory_), directory_ + ": a directory, not a file" + advice);
    ASSERT_EQ(mkfifo(path().c_str(), 0600), 0);
    EXPECT_EQ(complaintAboutFile(path()), path() + ": not a regular file" + advice);
    EXPECT_EQ(complaintAboutFile("/dev/null"), "/dev/null: not a regular file" + advice);
}

TEST_F(SettingsFile, ThatIsADanglingLinkIsNotTakenForAMissingOne) {
    ASSERT_EQ(symlink("nowhere", path().c_str()), 0);
    EXPECT_EQ(complaintAboutFile(path()), path() + ": a symbolic link to a file that does not exist; put it right, or "
                                                   "remove the file to get the defaults");
}

TEST_F(SettingsFile, ThatCannotBeOpenedIsAnErrorAndNotTheDefaults) {
    ASSERT_EQ(symlink("a.conf", path().c_str()), 0);
    EXPECT_EQ(complaintAboutFile(path()).find(path() + ": cannot open: "), 0U);
    EXPECT_EQ(complaintAboutFile("/dev/null/a.conf").find("/dev/null/a.conf: cannot open: "), 0U);
}

TEST_F(SettingsFile, ThatIsUnreadableIsAnErrorAndNotTheDefaults) {
    write("handoff_wait = 7\n");
    ASSERT_EQ(chmod(path().c_str(), 0), 0);
    // Root may read everything; the kernel takes that right away for as long as the thread has another user's fsuid.
    const auto own = setfsuid(65534);
    const std::string complaint = complaintAboutFile(path());
    setfsuid(static_cast<uid_t>(own));
    EXPECT_EQ(complaint.find(path() + ": cannot open: Permission denied; "), 0U) << complaint;
}

TEST_F(SettingsFile, MayHaveOneMebibyteAndNotAByteMore) {
    const std::string comment(1024 * 1024, '#');
    write(comment);
    EXPECT_EQ(loadSettings(path()), Settings());
    write(comment + "#");
    EXPECT_EQ(complaintAboutFile(path()).find(path() + ": larger than 1 MiB"), 0U);
}

TEST_F(SettingsFile, LeavesNoDescriptorOpenWhetherItIsGoodOrBad) {
    const auto descriptors = [] {
        const std::filesystem::directory_iterator all("/proc/self/fd");
        return std::distance(begin(all), end(all));
    };
    const auto before = descriptors();
    write("handoff_wait = 7\n");
    loadSettings(path());
    write("nonsense\n");
    complaintAboutFile(path());
    complaintAboutFile(directory_);
    EXPECT_EQ(descriptors(), before);
}

} // namespace
} // namespace leasehold
