/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* Runs commands in a host of the lab. A connection carries one request, a shell command and a NUL, and one reply: what
 * the command prints, a NUL, its exit status in decimal. Many may run at once; one that hangs (storage that does not
 * answer) holds up no other.
 *
 * "@SOCKET", a line feed and some text is no command: the text goes to whoever listens at that Unix socket, and what he
 * says comes back. An emulated processor takes a tenth of a second to start a shell, and there are thousands of such
 * orders (actor.cpp). */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PORT = 7000, LONGEST_COMMAND = 1 << 16 };

static void run_shell(const char* command, int connection) {
    int nothing = open("/dev/null", O_RDONLY);

    setsid();
    dup2(nothing, STDIN_FILENO);
    dup2(connection, STDOUT_FILENO);
    dup2(connection, STDERR_FILENO);
    execl("/bin/bash", "bash", "-c", command, (char*)NULL);
    _exit(127);
}

static void pass_on(const char* request, int connection) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char* text = strchr(request, '\n');
    int actor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char answer[1 << 12];
    ssize_t got;

    if (text == NULL || (size_t)(text - request) >= sizeof address.sun_path)
        return;
    memcpy(address.sun_path, request, text - request);
    if (connect(actor, (struct sockaddr*)&address, sizeof address) < 0 || write(actor, text + 1, strlen(text + 1)) < 0)
        return;
    while ((got = read(actor, answer, sizeof answer)) > 0)
        if (write(connection, answer, got) < 0)
            return;
}

static int read_request(int connection, char* command) {
    int length = 0;
    ssize_t got;

    while (length < LONGEST_COMMAND) {
        got = read(connection, command + length, LONGEST_COMMAND - length);
        if (got <= 0)
            return -1;
        length += got;
        if (command[length - 1] == '\0')
            return 0;
    }
    return -1;
}

static void serve(int connection) {
    static char command[LONGEST_COMMAND];
    char end[16] = "";
    int status = 0, length;
    pid_t child;

    if (read_request(connection, command) < 0)
        return;
    if (command[0] == '@') {
        pass_on(command + 1, connection);
        return;
    }
    child = fork();
    if (child == 0)
        run_shell(command, connection);
    waitpid(child, &status, 0);
    length = sprintf(end + 1, "%d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    if (write(connection, end, length + 1) < 0)
        return; /* whoever asked is gone */
    /* Not close: what the command left running in the background still has the connection as its output. */
    shutdown(connection, SHUT_RDWR);
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), connection;

    if (bind(listener, (struct sockaddr*)&address, sizeof address) < 0 || listen(listener, 64) < 0) {
        perror("agent");
        return 1;
    }
    signal(SIGCHLD, SIG_IGN); /* the servers reap their commands, nobody reaps the servers */
    for (;;) {
        connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0)
            continue;
        if (fork() == 0) {
            signal(SIGCHLD, SIG_DFL);
            serve(connection);
            _exit(0);
        }
        close(connection);
    }
}
