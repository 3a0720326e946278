// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/lease/record.hpp"
#include "tests/support/unit_support.hpp"

#include <fcntl.h>
#include <sys/xattr.h>
#include <unistd.h>

namespace leasehold::lease {
namespace {

OwnerRecord sample() {
    return {.domain = "web-1",
            .uuid = {0xab, 2},
            .incarnation = 0x12ab34cd,
            .host = "node-a.example",
            .bootId = "6a6a1f3e-1111-2222-3333-444455556666",
            .pid = 4242,
            .mode = Mode::shared,
            .since = 1'700'000'000};
}

TEST(Record, ComesBackAsItWasWritten) {
    for (Mode mode : {Mode::exclusive, Mode::shared, Mode::readOnly}) {
        OwnerRecord record = sample();
        record.mode = mode;
        EXPECT_EQ(parseRecord(encodeRecord(record)), record);
    }
}

TEST(Record, IsLinesThatAPersonCanRead) {
    EXPECT_EQ(encodeRecord(sample()), "domain=web-1\nuuid=ab020000-0000-0000-0000-000000000000\nincarnation=12ab34cd\n"
                                      "host=node-a.example\nboot=6a6a1f3e-1111-2222-3333-444455556666\npid=4242\n"
                                      "mode=shared\nsince=1700000000\n");
}

TEST(Record, OfAHostIsPutIntoACommandOnlyWhatIsAName) {
    for (const char* name : {"h1", "node-2.example.org", "192.0.2.1"})
        EXPECT_EQ(hostForCommand(name), name);
    for (const char* name : {"", "-f", "h1; reboot", "$(reboot)", "h'1", "h 1"})
        EXPECT_EQ(hostForCommand(name), "HOST") << name;
}

TEST(Record, OfALaterVersionIsReadAsFarAsItIsKnown) {
    auto record = parseRecord(encodeRecord(sample()) + "colour=green\nno sign\n\n=\n");
    EXPECT_EQ(record, sample());
}

TEST(Record, WithoutDomainUuidOrIncarnationIsNone) {
    const std::string text = encodeRecord(sample());
    for (const char* key : {"domain=", "uuid=", "incarnation="}) {
        std::string cut = text;
        std::size_t at = cut.find(key);
        cut.erase(at, cut.find('\n', at) + 1 - at);
        EXPECT_EQ(parseRecord(cut), std::nullopt) << key;
    }
    EXPECT_EQ(parseRecord(""), std::nullopt);
    EXPECT_EQ(parseRecord("\n\n\n"), std::nullopt);
    EXPECT_EQ(parseRecord("domain=\nuuid=ab020000-0000-0000-0000-000000000000\nincarnation=1\n"), std::nullopt);
    EXPECT_EQ(parseRecord("domain=a\nuuid=ab02\nincarnation=1\n"), std::nullopt);
    EXPECT_EQ(parseRecord("domain=a\nuuid=ab020000-0000-0000-0000-000000000000\nincarnation=123456789\n"), std::nullopt)
        << "more than 32 bits";
}

TEST(Record, ThatIsHostileLosesWhatIsNotPrintable) {
    auto record = parseRecord("domain=ev\x1b[2Jil\x7f\r\tguest\nuuid=ab020000-0000-0000-0000-000000000000\n"
                              "incarnation=1\nhost=\xff\xfe"
                              "a\x01\nboot=\x1b]0;x\x07\npid=-99999999999999999999\n"
                              "since=1e9\nmode=root\n");
    ASSERT_TRUE(record);
    EXPECT_EQ(record->domain, "ev?[2Jil???guest");
    EXPECT_EQ(record->host.find('\x01'), std::string::npos);
    EXPECT_EQ(record->bootId, "?]0;x?");
    EXPECT_EQ(record->pid, 0);
    EXPECT_EQ(record->since, 0);
    EXPECT_EQ(record->mode, Mode::exclusive);
}

TEST(Record, ThatIsTooLongIsNone) {
    EXPECT_EQ(parseRecord(encodeRecord(sample()) + std::string(4096, 'x')), std::nullopt);
}

TEST(Record, OfAGuestWhoseNameTriesToAddLinesStaysOneLinePerKey) {
    OwnerRecord record = sample();
    record.domain = "a\nuuid=00000000-0000-0000-0000-000000000000\n";
    record.host = "h\npid=1";
    auto parsed = parseRecord(encodeRecord(record));
    ASSERT_TRUE(parsed);
    EXPECT_EQ(parsed->uuid, record.uuid);
    EXPECT_EQ(parsed->pid, record.pid);
}

TEST(Record, WithTheLongestNamesFitsIntoWhatIsRead) {
    OwnerRecord record = sample();
    record.domain = std::string(1000, '\xff'); // each byte becomes a replacement character of three
    record.host = std::string(1000, '\xff');
    EXPECT_TRUE(parseRecord(encodeRecord(record)));
}

TEST(Names, KeepLettersOfAllLanguagesAndNoControls) {
    EXPECT_EQ(cleanName("gäste-域"), "gäste-域");
    EXPECT_EQ(cleanName("a\nb\x1b"), "a?b?");
    EXPECT_EQ(cleanName("\u202e"
                        "drawkcab"),
              "?drawkcab")
        << "no change of the writing direction";
    EXPECT_EQ(cleanName(std::string(5000, 'x')).size(), 255u);
    EXPECT_EQ(cleanName(""), "");
    EXPECT_EQ(cleanName(std::string_view("a\0b", 3)).find('\0'), std::string::npos);
}

class RecordOnAFile : public unit::LeavesNoDescriptor {
protected:
    unit::TempDir dir;
    std::string image = dir.file("disk.img");
    os::Fd fd = os::openFile(image, O_RDWR);

    bool attributesWork() const { return fsetxattr(fd.get(), "user.leasehold", "", 0, 0) == 0; }
};

TEST_F(RecordOnAFile, IsReadByWhoeverOpensIt) {
    if (!attributesWork())
        GTEST_SKIP() << "no user attributes on this file system";
    writeRecord(fd.get(), sample());
    os::Fd other = os::openFile(image, O_RDONLY);
    EXPECT_EQ(readRecord(other.get()), sample());
    OwnerRecord next = sample();
    next.domain = "w";
    writeRecord(fd.get(), next);
    EXPECT_EQ(readRecord(other.get()), next) << "the last one counts, whole";
}

TEST_F(RecordOnAFile, IsNoneWhereThereIsNone) {
    EXPECT_EQ(readRecord(fd.get()), std::nullopt);
    if (attributesWork()) {
        EXPECT_EQ(readRecord(fd.get()), std::nullopt) << "empty";
    }
}

TEST_F(RecordOnAFile, ThatSomebodyMadeTooLongIsNone) {
    std::string text = encodeRecord(sample()) + std::string(3000, '#');
    if (fsetxattr(fd.get(), "user.leasehold", text.data(), text.size(), 0) < 0)
        GTEST_SKIP() << "no user attributes of that size here";
    EXPECT_EQ(readRecord(fd.get()), std::nullopt);
}

TEST_F(RecordOnAFile, WithoutExtendedAttributesHarmsNothing) {
    os::Fd proc = os::openFile("/proc/self/status", O_RDONLY);
    EXPECT_NO_THROW(writeRecord(proc.get(), sample()));
    EXPECT_EQ(readRecord(proc.get()), std::nullopt);
    EXPECT_NO_THROW(writeRecord(-1, sample()));
}

} // namespace
} // namespace leasehold::lease
