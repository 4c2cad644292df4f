"""Runs a program at a terminal of its own and types answers into it.

terminal.py PROGRAM [ARGUMENT...], with lines PROMPT<TAB>ANSWER on stdin: each answer is typed when its prompt has appeared. Everything
that the terminal showed goes to stdout; the exit status is the program's.
"""

import os
import pty
import sys
import termios
import time

answers = [line.rstrip("\n").split("\t") for line in sys.stdin]
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
shown = b""
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    try:
        piece = os.read(terminal, 4096)
    except OSError:
        break
    if not piece:
        break
    shown += piece
    while answers and answers[0][0].encode() in shown:
        # The prompt comes after the echo is off; what is typed from now on tells.
        _, answer = answers.pop(0)
        os.write(terminal, answer.encode().decode("unicode_escape").encode("latin-1"))
echo = termios.tcgetattr(terminal)[3] & termios.ECHO
_, status = os.waitpid(pid, 0)
sys.stdout.write(shown.decode("utf-8", "replace"))
print(f"[echo {'on' if echo else 'off'}]")
sys.exit(os.waitstatus_to_exitcode(status))
