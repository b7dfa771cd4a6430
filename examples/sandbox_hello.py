"""A closed container: run a command, move a file, see why it ended.   python examples/sandbox_hello.py"""

from rorqual.sandbox import Sandbox

with Sandbox.create(memory_mb=256, timeout=60) as sb:
    sb.files.write("numbers.txt", "\n".join(str(n) for n in range(1, 101)))
    result = sb.commands.run("python3 -c 'print(sum(int(n) for n in open(\"numbers.txt\")))'", timeout=20)
    print("sum:", result.stdout.strip())

    slow = sb.commands.run("echo begun; sleep 60", timeout=1)
    print("stopped:", slow.timed_out, "kept:", slow.stdout.strip())

    for entry in sb.trajectory.list():
        print(entry.seq, entry.kind)
