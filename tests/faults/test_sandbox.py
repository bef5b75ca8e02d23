"""Some eighty hostile programs at every level of the sandbox, as root and as another user: none escapes, none hangs, nothing stays."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hostile
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.sandbox import levels, remote, seccomp
from recipes.sandbox.limits import Limits, Result, Status
from recipes.sandbox.local import Sandbox

ROOT = Path(__file__).resolve().parents[2]
OTHER_USER = ["setpriv", "--reuid", "61000", "--regid", "61000", "--clear-groups", "env", "HOME=/tmp", "PYTHONDONTWRITEBYTECODE=1"]
SLEEP_S, SLOW_S = 120, 30
"""A program that nobody ends sleeps for so long; what a busy machine may add to a limit."""
CONFIGURATIONS = [(level, user) for level in ("bubblewrap", "process") for user in ("us", "another")]


def need(level: str) -> None:
    """Fail the test that asks where the level does not work: no level goes untested."""
    try:
        levels.find(level)
    except RuntimeError as error:
        pytest.fail(f"the sandbox level {level} does not work here: {error}; see recipes/sandbox/README.md", pytrace=False)


@pytest.fixture(scope="module")
def readable():
    """A copy of what hostile.py needs that every user can read, wherever the checkout lies."""
    with tempfile.TemporaryDirectory(prefix="readable-") as folder:
        root = Path(folder)
        shutil.copytree(ROOT / "recipes" / "sandbox", root / "recipes" / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "tests" / "faults").mkdir(parents=True)
        shutil.copy(hostile.__file__, root / "tests" / "faults")
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        yield root / "tests" / "faults" / "hostile.py"


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda pair: f"{pair[0]}-as-{pair[1]}")
def outcome(request, readable):
    """(facts per program, what was left) of one run over all programs."""
    level, user = request.param
    need(level)
    command = [sys.executable, str(readable), level]
    if user == "another":
        if os.geteuid() != 0:
            pytest.skip("only root changes its user")
        command = [*OTHER_USER, "/usr/bin/python3", *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd="/")
    assert done.returncode == 0, done.stderr
    *lines, left = map(json.loads, done.stdout.splitlines())
    return {facts["name"]: facts for facts in lines}, left


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_a_hostile_program(outcome, name):
    facts, allowed = outcome[0][name], hostile.PROGRAMS[name][0]
    said = facts["stdout"] + facts["stderr"]
    assert "ESCAPED" not in said and hostile.SECRET not in said, facts
    assert facts["status"] in allowed, facts
    assert facts["took_s"] < hostile.LIMITS.wall_s + SLOW_S and facts["explain"]


def test_nothing_is_left_behind(outcome):
    facts, left = outcome
    assert len(facts) == len(hostile.PROGRAMS) >= 40
    assert left["victim_alive"] and left["outside"] == [] and left["left"] == [] and left["folders"] == []


CONTROL = (
    "secret_file",
    "secret_by_link",
    "own_environment",
    "write_outside",
    "tcp",
    "unix_socket",
    "memfd",
    "ptrace_me",
    "new_privileges",
)


def test_the_programs_do_escape_where_there_is_no_sandbox(tmp_path):
    """Else a green test above would prove nothing."""
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text(hostile.SECRET)
    outside.mkdir()
    with hostile.socket.socket(1) as unix, hostile.socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        fill = {"secret_file": secret, "outside": outside, "socket": tmp_path / "s", "port": tcp.getsockname()[1]}
        for name in CONTROL:
            code = hostile.PROGRAMS[name][1]
            for key, value in fill.items():
                code = code.replace("{" + key + "}", str(value))
            environment = os.environ | {"HEDDLE_TEST_SECRET": hostile.SECRET}
            done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
            assert "ESCAPED" in done.stdout or hostile.SECRET in done.stdout, (name, done)
    assert (outside / "x").exists()


@pytest.fixture(params=("bubblewrap", "process"))
def sandbox(request):
    need(request.param)
    with Sandbox(Limits(wall_s=SLEEP_S), level=request.param, parallel=2) as pool:
        yield pool


def test_files_input_and_exit_codes_pass_through(sandbox):
    files = {
        "main.py": "import sys, lib.x as x\nprint(x.f(int(input())), sys.stdin.read())\nsys.exit(3)",
        "lib/x.py": "def f(n): return n + 1",
    }
    result = sandbox.run(files, stdin="4\nrest é\n")
    assert (result.status, result.exit_code, result.stdout) == (Status.FAILED, 3, "5 rest é\n\n")
    assert sandbox.run({"main.py": "import sys; exit()"}).ok
    assert sandbox.run({}, ["/bin/echo", "no Python"]).stdout == "no Python\n"
    wrong = sandbox.run({"main.py": "int('x')"})
    assert wrong.explain() == "ValueError: invalid literal for int() with base 10: 'x'"
    for bad in ("../x", "/etc/x", "a/../../x"):
        assert sandbox.run({bad: ""}).status is Status.UNAVAILABLE
    assert sandbox.run({}, ["/no/such/program"]).status is Status.UNAVAILABLE


async def test_cancelling_ends_the_run_and_frees_its_place(sandbox):
    tasks = [asyncio.create_task(sandbox.arun({"main.py": f"import time; time.sleep({SLEEP_S})"})) for _ in range(2)]
    await asyncio.sleep(0.3)
    for task in tasks:
        task.cancel()
    start = time.monotonic()
    assert (await sandbox.arun({"main.py": "print(1)"})).stdout == "1\n"
    assert time.monotonic() - start < SLEEP_S / 2


def test_a_missing_level_is_said_with_what_to_do(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    levels.find.cache_clear()
    monkeypatch.setattr("recipes.sandbox.local._warned", False)
    caplog.set_level("WARNING")  # whatever ran before may have switched logging off
    try:
        with pytest.raises(RuntimeError, match="apt-get install bubblewrap"):
            levels.find("bubblewrap")
        with Sandbox(parallel=1) as pool:
            assert pool.level.name == "process" and pool.run({"main.py": "print(1)"}).ok
        assert "SANDBOX IS WEAKER" in caplog.text and "apt-get install bubblewrap" in caplog.text
    finally:
        levels.find.cache_clear()
    with pytest.raises(ValueError, match="auto, bubblewrap or process"):
        levels.find("docker")
    with pytest.raises(ValueError, match="wall_s"):
        Limits(wall_s=0)


def test_the_filter_knows_both_machines_and_says_when_it_does_not():
    for machine, numbers in seccomp.DENIED.items():
        assert len(set(numbers.values())) == len(numbers) and len(seccomp.filter_program(machine)) % 8 == 0
    assert seccomp.DENIED["x86_64"].keys() == seccomp.DENIED["aarch64"].keys()
    assert seccomp.filter_program("sparc") == b""


ANSWERS = {
    "fine": ({"status": "Success", "run_result": {"status": "Finished", "return_code": 0, "stdout": "1\n", "stderr": ""}}, Status.OK),
    "raises": ({"status": "Failed", "run_result": {"status": "Finished", "return_code": 1, "stdout": "", "stderr": "E: x"}}, Status.FAILED),
    "slow": ({"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "return_code": None, "stdout": "1"}}, Status.TIMEOUT),
    "broken": ({"status": "SandboxError", "message": "no room"}, Status.UNAVAILABLE),
    "strange": (["what"], Status.UNAVAILABLE),
}


@pytest.fixture
def service():
    """A stand-in for a SandboxFusion server (a fake: the real one is a container) that answers by the name of the task in the code."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(ANSWERS[asked[-1]["code"]][0]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/run_code", asked
        server.shutdown()


def test_a_remote_sandbox_gives_the_same_kind_of_result(service):
    url, asked = service
    with remote.RemoteSandbox(url, Limits(wall_s=3, address_mb=100)) as pool:
        for code, (_, status) in ANSWERS.items():
            result = pool.run({"main.py": code, "data.txt": "é"}, stdin="in")
            assert isinstance(result, Result) and result.status is status, code
        assert asked[0]["stdin"] == "in" and asked[0]["run_timeout"] == 3 and asked[0]["memory_limit_MB"] == 100
        assert asked[0]["files"] == {"data.txt": "w6k="} and asked[0]["language"] == "python"
    with remote.RemoteSandbox("http://127.0.0.1:1/run_code") as pool:
        gone = pool.run({"main.py": "1"})
    assert gone.status is Status.UNAVAILABLE and "http://127.0.0.1:1/run_code" in gone.explain()


def test_one_setting_chooses_between_them(service):
    with remote.connect(service[0]) as pool:
        assert isinstance(pool, remote.RemoteSandbox)
    with remote.connect("auto", parallel=1) as pool:
        assert isinstance(pool, Sandbox)
    with pytest.raises(ValueError, match="auto, bubblewrap or process"):
        remote.connect("nonsense")
