"""Programs that a sandbox must survive, and a way to run them all; standard library only, so that any user's Python can run it.

    hostile.py LEVEL      prints one JSON object per program; see test_sandbox.py for what must hold

A program that gets what it must not have prints ESCAPED. `{secret_file}`, `{outside}`, `{socket}`, `{victim}` are filled in: a file of ours
that everybody may read, a folder that everybody may write, a Unix socket that accepts, the id of a process of ours.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.sandbox import launch
from recipes.sandbox.limits import Limits
from recipes.sandbox.local import Sandbox

SECRET = "correct-horse-battery-staple"
LIMITS = Limits(wall_s=8, cpu_s=8, address_mb=256, memory_mb=128, disk_mb=8, processes=12, output_kb=64)
ENDLESS = replace(LIMITS, wall_s=3, cpu_s=3)
"""Of programs that may not end before a limit does it: seconds of a core each."""

SYSCALL = "import ctypes,os\nc=ctypes.CDLL(None,use_errno=True)\n"
TRY = "try:\n {}\n print('ESCAPED')\nexcept OSError as e:\n print(e)\n"
ESCAPED_IF = SYSCALL + "r={}\nprint('ESCAPED' if r>=0 else os.strerror(ctypes.get_errno()))"


def attempt(statement: str, imports: str = "os") -> str:
    return f"import {imports}\n" + TRY.format(statement)


OK, FAILED, SIGNAL, TIMEOUT, MEMORY, DISK, OUTPUT = "ok", "failed", "signal", "timeout", "memory", "disk", "output"

PROGRAMS: dict[str, tuple[tuple[str, ...], str]] = {
    # processes
    "fork_bomb": ((TIMEOUT, MEMORY), "import os\nwhile 1:\n try: os.fork()\n except OSError: pass"),
    "thread_bomb": ((FAILED,), "import threading,time\nwhile 1: threading.Thread(target=time.sleep,args=(9,),daemon=True).start()"),
    "zombies": ((FAILED,), "import os\nwhile 1:\n if os.fork()==0: os._exit(0)"),
    "detached": ((OK,), "import os,time\nif os.fork()==0:\n os.setsid()\n if os.fork()==0:\n  time.sleep(60)"),
    "detached_silent": ((OK,), "import os,time\nif os.fork()==0:\n os.setsid()\n os.closerange(0,64)\n time.sleep(60)"),
    "deaf_daemon": (
        (OK,),
        "import os,signal,time\nif os.fork()==0:\n os.setsid()\n"
        " for s in set(signal.valid_signals())-{9,19}: signal.signal(s,signal.SIG_IGN)\n"
        " while 1: time.sleep(1)",
    ),
    "pid_chaser": ((OK,), "import os\nif os.fork()==0:\n os.setsid()\n while 1:\n  if os.fork(): os._exit(0)"),
    "shell_background": ((OK,), "import subprocess\nsubprocess.run(['/bin/sh','-c','(setsid sleep 60 &) ; exit 0'])"),
    # The parent inside a PID namespace is its process 1, which is immune; outside of one it must not be reached.
    "kill_parent": ((OK,), "import os\ntry: os.kill(os.getppid(),9)\nexcept OSError as e: print(e)"),
    "stop_parent": ((OK,), "import os\ntry: os.kill(os.getppid(),19)\nexcept OSError as e: print(e)"),
    "kill_everything": ((OK, SIGNAL), "import os\ntry: os.kill(-1,9)\nexcept OSError as e: print(e)"),
    "kill_victim": ((OK,), attempt("os.kill({victim},9)")),
    "kill_own_group": ((SIGNAL,), "import os\nos.kill(0,9)"),
    "kill_itself": ((SIGNAL,), "import os\nos.kill(os.getpid(),9)"),
    "ignores_end": ((TIMEOUT,), "import signal,time\nsignal.signal(15,signal.SIG_IGN)\nwhile 1: time.sleep(1)"),
    "spins": ((TIMEOUT,), "while 1: pass"),
    "closes_and_stays": ((TIMEOUT,), "import os,time\nos.close(0);os.close(1);os.close(2)\ntime.sleep(60)"),
    "waits_for_input": ((FAILED,), "input()\ninput()"),
    "segfault": ((SIGNAL,), "import ctypes\nctypes.string_at(0)"),
    "deep_recursion": ((FAILED, SIGNAL, MEMORY), "import sys\nsys.setrecursionlimit(10**8)\nf=lambda n:f(n+1)\nf(0)"),
    "exit_code": ((FAILED,), "import os\nos._exit(77)"),
    # memory, disk, output
    "memory_bomb": ((FAILED, MEMORY), "a=[]\nwhile 1: a.append(bytearray(1<<20))"),
    "memory_by_many": (
        (MEMORY,),
        "import os,time\nfor _ in range(8):\n if os.fork()==0:\n  a=bytearray(os.urandom(1)*(60<<20))\n  time.sleep(9)\ntime.sleep(9)",
    ),
    "shared_memory": ((FAILED, MEMORY, OK), "import mmap\na=[]\nwhile 1:\n m=mmap.mmap(-1,16<<20)\n m.write(b'x'*(16<<20))\n a.append(m)"),
    "memfd": ((OK,), attempt("os.memfd_create('x')")),
    "sysv_shared_memory": ((OK,), ESCAPED_IF.format("c.shmget(0,1<<24,0o1600)")),
    "dev_shm": ((FAILED,), "f=open('/dev/shm/x','wb')\nwhile 1: f.write(b'x'*(1<<20))"),
    "huge_file": ((FAILED, SIGNAL, DISK), "f=open('x','wb')\nwhile 1: f.write(b'x'*(1<<20))"),
    "many_large_files": ((FAILED, DISK), "i=0\nwhile 1:\n open(str(i:=i+1),'wb').write(b'x'*(1<<20))"),
    "many_empty_files": ((DISK, FAILED), "i=0\nwhile 1:\n open(str(i:=i+1),'wb').close()"),
    "deep_folders": ((OK, FAILED), "import os\nfor _ in range(2500):\n os.mkdir('d'*50)\n os.chdir('d'*50)"),
    "closed_folders": ((OK,), "import os\nos.makedirs('a/b/c')\nopen('a/b/c/x','w').close()\nos.chmod('a/b',0)\nos.chmod('a',0)"),
    "strange_names": ((OK,), "for n in [b'\\n',b'\\xff\\xfe',b'-rf',b'x'*255]: open(n,'w').close()"),
    "endless_output": ((OUTPUT,), "while 1: print('x'*1000)"),
    "endless_errors": ((OUTPUT,), "import sys\nwhile 1: sys.stderr.write('x'*1000)"),
    "long_line": ((OUTPUT,), "import sys\nsys.stdout.write('x'*(50<<20))"),
    "not_utf8": ((OK,), "import os\nos.write(1,bytes(range(256))*4)"),
    "closed_pipe_writer": (
        (OUTPUT,),
        "import os\nif os.fork()==0:\n os.setsid()\n while 1: os.write(1,b'x'*4096)\nimport time;time.sleep(5)",
    ),
    # files and secrets
    "shadow": ((OK,), attempt("print(open('/etc/shadow').read())")),
    "secret_file": ((OK,), attempt("print(open('{secret_file}').read())")),
    "secret_by_link": ((OK,), attempt("os.symlink('{secret_file}','l');print(open('l').read())")),
    "secret_by_hard_link": ((OK,), attempt("os.link('{secret_file}','l');print(open('l').read())")),
    "secret_by_dots": ((OK,), attempt("print(open('../'*20+'{secret_file}').read())")),
    "list_secrets": ((OK,), attempt("print(os.listdir(os.path.dirname('{secret_file}')))")),
    "own_environment": ((OK,), "import os\nprint(dict(os.environ))\ntry: print(open('/proc/self/environ').read())\nexcept OSError: pass"),
    "all_environments": (
        (OK,),
        "import glob\nfor p in glob.glob('/proc/[0-9]*/environ')+['/proc/%d/environ'%i for i in range(1,3000)]:\n"
        " try: print(p,open(p).read())\n except OSError: pass",
    ),
    "parent_memory": ((OK,), attempt("open('/proc/%d/mem'%os.getppid(),'rb').read(1)")),
    "victim_memory": ((OK,), attempt("open('/proc/{victim}/mem','rb').read(1)")),
    "victim_root": ((OK,), attempt("print(os.listdir('/proc/{victim}/root/'))")),
    "write_outside": ((OK,), attempt("open('{outside}/x','w')")),
    "write_by_link": ((OK,), attempt("os.symlink('{outside}','d');open('d/x','w')")),
    "write_home": ((OK,), attempt("open('/root/x','w')")),
    "write_system": ((OK,), attempt("open('/usr/bin/heddle-was-here','w')")),
    "write_kernel_setting": ((OK,), attempt("open('/proc/sys/kernel/core_pattern','w')")),
    "remove_outside": ((OK,), attempt("os.rmdir('{outside}')")),
    "raw_disk": ((OK,), attempt("[os.open(d,os.O_RDONLY) for d in ('/dev/mem','/dev/kmsg','/dev/sda','/dev/vda')]")),
    "terminal": ((OK,), attempt("os.open('/dev/tty',os.O_RDWR)")),
    "leaked_files": ((OK,), "import os\nfor fd in range(3,64):\n try: os.fstat(fd);print('ESCAPED',fd)\n except OSError: pass"),
    # network
    "tcp": ((OK,), attempt("socket.create_connection(('127.0.0.1',{port}),1)", "socket")),
    "tcp_far": ((OK,), attempt("socket.create_connection(('1.1.1.1',53),1)", "socket")),
    "dns": ((OK,), attempt("socket.getaddrinfo('example.com',80)", "socket")),
    "udp": ((OK,), attempt("socket.socket(2,2).sendto(b'x',('127.0.0.1',9))", "socket")),
    "listen": ((OK,), attempt("socket.create_server(('127.0.0.1',0))", "socket")),
    "unix_socket": ((OK,), attempt("socket.socket(1,1).connect('{socket}')", "socket")),
    "abstract_socket": ((OK,), attempt("socket.socket(1,1).connect('\\0heddle-{port}')", "socket")),
    "netlink": ((OK,), attempt("socket.socket(16,3,0)", "socket")),
    "pairs_still_work": ((OK,), "import asyncio\nasync def f(): await asyncio.sleep(0)\nasyncio.run(f())"),
    # the kernel
    "become_root": ((OK,), attempt("os.setuid(0);os.seteuid(0)")),
    "new_privileges": ((OK,), ESCAPED_IF.format("-c.prctl(39,0,0,0,0)")),
    "user_namespace": ((OK,), ESCAPED_IF.format("c.unshare(0x10000000)")),
    "user_namespace_clone": ((OK,), "import subprocess\np=subprocess.run(['/usr/bin/unshare','-Ur','echo','ESCAPED'])"),
    "mount": ((OK,), ESCAPED_IF.format("c.mount(b'x',b'.',b'tmpfs',0,0)")),
    "chroot": ((OK,), attempt("os.chroot('.')")),
    "ptrace": ((OK,), ESCAPED_IF.format("c.ptrace(16,os.getppid(),0,0)")),
    "ptrace_me": ((OK,), ESCAPED_IF.format("c.ptrace(0,0,0,0)")),
    "read_parent": (
        (OK,),
        SYSCALL + "b=ctypes.create_string_buffer(8)\nv=(ctypes.c_void_p*2)(ctypes.addressof(b),8)\n"
        "print('ESCAPED' if c.process_vm_readv(os.getppid(),v,1,v,1,0)>0 else 'no')",
    ),
    "io_uring": ((OK,), ESCAPED_IF.format("c.syscall(425,8,ctypes.create_string_buffer(256))")),
    "keys": ((OK,), ESCAPED_IF.format("c.syscall({keyctl},0,-3,0)")),
    "raise_limits": (
        (OK,),
        "import resource as r\ntry:\n r.setrlimit(r.RLIMIT_NPROC,(-1,-1));print('ESCAPED')\nexcept (OSError,ValueError): pass",
    ),
    "raise_priority": ((OK,), attempt("os.nice(-10)")),
    "real_time": ((OK,), attempt("os.sched_setscheduler(0,os.SCHED_FIFO,os.sched_param(1))")),
}


def folders() -> set[str]:
    """Of sandboxes on this machine."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("heddle-sandbox-")}


def main(level: str) -> None:
    before = folders()
    # One user id for all runs: they then share the process limit, so that a bomb is felt next door.
    parallel = 1 if level == "process" and os.geteuid() else 4
    os.environ["HEDDLE_TEST_SECRET"] = SECRET
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, ExitStack() as stack:
        kept, endless = (stack.enter_context(Sandbox(limits, level=level, parallel=parallel)) for limits in (LIMITS, ENDLESS))
        os.chmod(folder, 0o755)
        outside = Path(folder, "outside")
        outside.mkdir()
        outside.chmod(0o777)
        Path(folder, "secret").write_text(SECRET)
        unix, abstract, tcp = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.1", 0))
        unix.bind(f"{folder}/socket")
        os.chmod(f"{folder}/socket", 0o777)
        abstract.bind(f"\0heddle-{tcp.getsockname()[1]}")
        unix.listen(), abstract.listen()
        victim = subprocess.Popen(["sleep", "300"], env={"SECRET": SECRET})
        fill = {"secret_file": f"{folder}/secret", "outside": str(outside), "socket": f"{folder}/socket", "victim": str(victim.pid)}
        fill |= {"port": str(tcp.getsockname()[1]), "keyctl": "250" if os.uname().machine == "x86_64" else "219"}

        def run(name: str) -> dict:
            allowed, code = PROGRAMS[name]
            for key, value in fill.items():
                code = code.replace("{" + key + "}", value)
            start = time.monotonic()
            result = (endless if TIMEOUT in allowed else kept).run({"main.py": code}, stdin="one line\n")
            facts = {"name": name, "status": str(result.status), "stdout": result.stdout[-4000:], "stderr": result.stderr[-1000:]}
            return facts | {"took_s": time.monotonic() - start, "code": result.exit_code, "explain": result.explain()}

        with ThreadPoolExecutor(parallel) as pool:
            for facts in pool.map(run, PROGRAMS):
                print(json.dumps(facts))
        uids = {uid for sandbox in (kept, endless) for uid, _ in sandbox._locks}
        facts = {"victim_alive": victim.poll() is None, "outside": os.listdir(outside), "level": kept.level.name}
        victim.kill()
        victim.wait()
        facts["left"] = [pid for pid, parent, uid, _ in launch.processes() if uid in uids or parent == os.getpid()]
        facts["folders"] = sorted(folders() - before)
        facts["lacks"] = kept.level.lacks
        print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
