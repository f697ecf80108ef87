"""What the template of a file can do to the process that asks for a rendering: nothing."""

from __future__ import annotations

import datetime
import gc
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mer.errors import TemplateError
from mer.text.renderer import MOST_DETAIL_CHARS, Call, Renderer, TemplateInput, plan_bytes

HI = TemplateInput(
    roles=["user"],
    contents=[["hi"]],
    variables={"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True},
    now=datetime.datetime(2026, 1, 2, 3, 4, 5),
)
TIED = "{% set ns = namespace() %}{% set ns.a = [ns] %}"
DEEP = "{% set ns = namespace(x=[]) %}{% for i in range(60000) %}{% set ns.x = [ns.x] %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x=['x' * 1000]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
HOSTILE = {
    "syntax": ("{% if %}", "at line 1: Expected an expression"),
    "unknown filter": ("\n\n{{ messages | steal }}", "at line 3: No filter named 'steal'"),
    "deep parentheses": ("{{ " + "(" * 30_000, "nests too deep"),
    "deep blocks": ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    "tied": (TIED + "{{ ns | tojson }}", "not JSON serializable"),
    "deep": (DEEP + "{{ ns.x | tojson }}", "nests too deep"),
    "deep comparison": (DEEP + "{{ ns.x == [ns.x] }}{{ ns.x }}", "nests too deep"),
    "macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deep"),
    "doubled": (DOUBLED + "{{ ns.x }}", "needs more than 20.0 MiB of memory"),
    "long text": ("{{ 'a' * 10000000000 }}", "needs more than 20.0 MiB of memory"),
    "wide format": ("{{ '%10000000000d' % 1 }}", "needs more than 20.0 MiB of memory"),
    "indent": ("{{ messages | tojson(indent=1000000000) }}", "needs more than 20.0 MiB of memory"),
    "much text": ("{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}", "makes more than [0-9]+ characters"),
    "big integers": ("{{ 10 ** 5000 }}", "ValueError"),
    "surrogates": ("{{ '\\ud800' }}", "text that is not valid Unicode"),
    "unsaid": ("{{ raise_exception(messages) }}", "refuses these messages: "),
    "untold": (TIED + "{{ raise_exception('x' * 100000) }}", "refuses these messages: x+\\.\\.\\.$"),
    "lines": ("{{ raise_exception('a\\n\\x1b[31m\\nb') }}", "refuses these messages: a \\[31m b$"),
    "missing": ("{{ missing.name }}", "'missing' is undefined"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "type": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "growth": ("{% set a = ['a'] %}{% for i in range(99) %}{% set _ = a.extend(a) %}{% endfor %}", "needs more than"),
    "cycle": ("{% set a = [] %}{% set _ = a.append(a) %}{{ a | tojson }}", "Circular"),
    "time": ("{{ strftime_now(1) }}", "must be str"),
}


class Templates:
    """Renders templates in one process after the other, as many as it takes."""

    def __init__(self) -> None:
        self.renderer = Renderer("", "some.gguf")

    def render(self, source: str) -> str:
        self.renderer._source = source
        (text,) = self.renderer.render(HI)
        return text


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    made = Templates()
    yield made
    made.renderer.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_line_that_names_the_file(templates: Templates, name: str) -> None:
    source, said = HOSTILE[name]
    with pytest.raises(TemplateError, match=said) as caught:
        templates.render(source)
    text = str(caught.value)
    assert text.startswith("some.gguf: the chat template ")
    assert text.isprintable()
    assert len(text) < len("some.gguf: the chat template refuses these messages at line 1000: ") + MOST_DETAIL_CHARS
    assert templates.render("{{ messages[0].content }}") == "hi"


def test_a_template_that_never_ends_is_ended(templates: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mer.text.renderer.CPU_S", 0)
    with pytest.raises(TemplateError, match="works for more than 1 s"):
        templates.render("{{ 7 ** (7 ** 12) }}")  # within one instruction of the interpreter
    assert templates.render("{{ messages[0].content }}") == "hi"


def test_a_process_that_crashes_fails_one_call(templates: Templates) -> None:
    templates.render("a")
    process = templates.renderer._process
    assert process is not None
    call = _Noticing(lambda: process.send_signal(signal.SIGSEGV))
    process.send_signal(signal.SIGSTOP)  # so that it does not answer before
    with pytest.raises(TemplateError, match=r"^some\.gguf: the chat template has ended its process by SIGSEGV"):
        templates.renderer.render(HI, call)
    assert templates.render("{{ messages[0].content }}") == "hi"


class _Noticing(Call):
    """Acts when a process begins to work for it."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act

    def begin(self, process: subprocess.Popen[bytes]) -> bool:
        begun = super().begin(process)
        self._act()
        process.send_signal(signal.SIGCONT)
        return begun


def test_a_call_that_is_given_up_ends_its_process_and_no_other_call(templates: Templates) -> None:
    templates.render("a")
    process = templates.renderer._process
    assert process is not None
    call = _Noticing(lambda: call.give_up())
    with pytest.raises(TemplateError, match="without an answer"):
        templates.renderer.render(HI, call)
    assert process.poll() == -signal.SIGKILL
    assert templates.render("{{ messages[0].content }}") == "hi"
    call.give_up()  # too late for anything
    assert templates.render("{{ messages[0].content }}") == "hi"
    with pytest.raises(TemplateError, match="given up"):
        templates.renderer.render(HI, call)


def test_the_process_is_kept_and_leaves_nothing_behind() -> None:
    renderer = Renderer("{{ messages[0].content }}", "some.gguf")
    renderer.render(HI)
    process = renderer._process
    assert process is not None
    renderer.render(HI)
    assert renderer._process is process
    os.kill(process.pid, 0)
    del renderer
    gc.collect()
    with pytest.raises(ProcessLookupError):  # not even a zombie
        os.kill(process.pid, 0)


def test_a_process_that_large_messages_made_large_is_not_kept() -> None:
    keeping = (
        "{% set ns = namespace(x=[]) %}{% for i in range(40) %}{% set ns.x = ns.x + [m.content ~ i] %}{% endfor %}"
    )
    renderer = Renderer("{% set m = messages[0] %}" + keeping + "{{ ns.x | length }}", "some.gguf")
    large = TemplateInput(["user"], [["a" * (1 << 20)]], {}, HI.now)
    assert renderer.render(large) == renderer.render(HI) == ["40"]
    process = renderer._process
    assert process is not None
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert int(status.partition("RssAnon:")[2].split()[0]) << 10 < plan_bytes(1000)
    renderer.close()


def test_closing_ends_what_is_under_way() -> None:
    renderer = Renderer("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "some.gguf")
    begun = threading.Event()
    errors: list[str] = []

    def render() -> None:
        try:
            renderer.render(HI, _Noticing(begun.set))
        except TemplateError as error:
            errors.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    begun.wait()
    renderer.close()
    thread.join()
    assert [error.partition(" (")[0] for error in errors] == [
        "some.gguf: rendering the chat template has ended without an answer"
    ]
    with pytest.raises(TemplateError, match="given up"):
        renderer.render(HI)
    assert renderer._process is None


def test_a_forked_process_has_a_process_of_its_own_and_leaves_the_other_alone() -> None:
    program = """
import os, sys, datetime
from mer.text.renderer import TemplateInput, Renderer
chat = TemplateInput(["user"], [["hi"]], {}, datetime.datetime.now())
renderer = Renderer("{{ messages[0].content }}", "some.gguf")
renderer.render(chat)
child = os.fork()
if not child:
    renderer.render(chat)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
before = renderer._process
print(renderer.render(chat), renderer._process is before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("['hi'] True\n", "")


def test_the_process_ends_with_the_one_that_started_it() -> None:
    program = """
import os, signal, datetime
from mer.text.renderer import TemplateInput, Renderer
renderer = Renderer("a", "some.gguf")
renderer.render(TemplateInput(["user"], [["hi"]], {}, datetime.datetime.now()))
print(renderer._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    _wait_for_end(int(done.stdout))


def _wait_for_end(pid: int) -> None:
    """Return when a process has ended, which is no child of this one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 60)[0]
    os.close(descriptor)


def test_the_process_has_nothing_but_its_pipes() -> None:
    renderer = Renderer("a", "some.gguf")
    with open(os.devnull) as inheritable:
        os.set_inheritable(inheritable.fileno(), True)
        renderer.render(HI)
    process = renderer._process
    assert process is not None
    folder = Path(f"/proc/{process.pid}")
    status = dict(line.split(":\t") for line in (folder / "status").read_text().splitlines())
    limits = {line[:25].strip(): line[26:].split()[:2] for line in (folder / "limits").read_text().splitlines()}
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["FDSize"]) <= 256
    for name in ("Max core file size", "Max open files", "Max processes", "Max file size"):
        assert limits[name] == ["0", "0"]
    assert os.getsid(process.pid) == process.pid
    assert int(status["RssAnon"].split()[0]) << 10 < plan_bytes(1)
    renderer.close()


ESCAPES = {
    "file": "open('/etc/passwd')",
    "socket": "__import__('_socket').socket()",
    "process": "os.fork()",
    "program": "os.execv('/bin/true', ['true'])",
    "signal": "os.kill(os.getppid(), 0)",
    "other's limits": "__import__('resource').prlimit(os.getppid(), 7, (9, 9))",
    "removal": "os.unlink('/nowhere')",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_python_that_escapes_the_sandbox_can_open_nothing(escape: str) -> None:
    program = f"""
import errno, os, sys
sys.path += {str(Path(__file__).parents[2] / "mer" / "text")!r},
import _socket, resource
from confinement import Confinement
assert Confinement().filtered
try:
    {ESCAPES[escape]}
except OSError as error:
    os.write(1, errno.errorcode[error.errno].encode())
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "EPERM", "")
