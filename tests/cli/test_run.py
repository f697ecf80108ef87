from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mer
from mer.cli import interrupt
from mer.cli.app import run_app
from mer.cli.console import Bars, load_reporter
from mer.cli.run import resolve
from mer.config import Progress, Sampling
from mer.embedded import embedded_model_path
from mer.errors import (
    ComputeError,
    ConfigError,
    ContextOverflow,
    GGUFError,
    MerError,
    NotEnoughMemory,
    TemplateError,
    UnsupportedModel,
)
from mer.version import VERSION
from tests.cli.fake_engine import STORY, FakeEngine

ROOT = Path(__file__).parents[2]
TEXT = "".join(STORY)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr("mer.opening.engine.open_engine", fake.open)
    for name in ("MER_MEMORY", "MER_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.mark.parametrize(
    ("positionals", "model", "tokens", "want_model", "want_prompt"),
    [
        (["Once upon"], None, None, None, "Once upon"),
        (["What is TCP/IP?"], None, None, None, "What is TCP/IP?"),
        (["and/or"], None, None, None, "and/or"),
        (["/ is a slash"], None, None, None, "/ is a slash"),
        (["./run it twice"], None, None, None, "./run it twice"),
        (["~ 5 minutes"], None, None, None, "~ 5 minutes"),
        (["a/b.gguf c"], None, None, None, "a/b.gguf c"),
        (["and/or", "Once"], None, None, "and/or", "Once"),
        (["m.gguf", "Once"], None, None, "m.gguf", "Once"),
        (["anything", "m.gguf"], None, None, "anything", "m.gguf"),
        (["m.gguf"], None, "1,2", "m.gguf", [1, 2]),
        (["name"], None, "7", "name", [7]),
        ([], None, "1, 2 ,3", None, [1, 2, 3]),
        (["present"], "m", None, "m", "present"),
        (["m2.gguf"], "m", None, "m", "m2.gguf"),
        ([], "m", "5", "m", [5]),
        (["x" * 5000], None, None, None, "x" * 5000),
        (["a\0b"], None, None, None, "a\0b"),
        ([""], None, None, None, ""),
    ],
)
def test_which_argument_is_model_and_which_prompt(
    positionals: list[str],
    model: str | None,
    tokens: str | None,
    want_model: str | None,
    want_prompt: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "present").touch()
    monkeypatch.chdir(tmp_path)
    task = resolve(positionals, model=model, tokens=tokens, stdin=False)
    assert task.model == (embedded_model_path() if want_model is None else Path(want_model))
    assert task.prompt == want_prompt


@pytest.mark.parametrize(
    "lone",
    ["m.gguf", "my models/m.gguf", "dir/absent", "dir/my model", "./m", "../m", "/m", "~/m", "~user/m", "present"],
)
def test_a_lone_model_lacks_a_prompt(lone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "present").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "my model").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"a prompt for .* is missing"):
        resolve([lone], model=None, tokens=None, stdin=False)


@pytest.mark.parametrize(
    ("positionals", "model", "tokens", "reason"),
    [
        ([], None, None, "a prompt is missing"),
        ([], "m", None, "a prompt for m is missing"),
        (["a", "b"], "m", None, "model is given twice"),
        (["a", "b"], None, "1", "prompt is given twice"),
        (["a"], "m", "1", "prompt is given twice"),
        (["a"], None, "", "not a list of token ids"),
        (["a"], None, "1,,2", "not a list of token ids"),
        (["a"], None, "-1", "not a list of token ids"),
        (["a"], None, "\u0661", "not a list of token ids"),
        (["a"], None, "9" * 5000, "not a list of token ids"),
    ],
)
def test_contradictions_are_usage_errors(
    positionals: list[str], model: str | None, tokens: str | None, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(positionals, model=model, tokens=tokens, stdin=False)


def test_the_answer_alone_goes_to_standard_output(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["run", "Tell me"]) == 0
    out, err = capsys.readouterr()
    assert out == TEXT + "\n"
    assert err.splitlines() == [
        "9 tokens (stop), 4.0 tokens/s",
        "prompt: 4 tokens, 5.3 tokens/s; first token after 750.0 ms; loaded in 500.0 ms",
        "experts: 75.0% of 40 lookups hit; read 4.00 KiB, 100 B per generated token",
        "memory: 99.0 MiB of a budget of 1.00 GiB; 20 slots of 2.00 MiB; peak RSS with file pages 123 MiB",
        "in force: portable kernels, int15 activations, f16 KV, 3 threads (2 in the last job: others have the cores), "
        "buffered reads by io_uring, layer-lru cache, context 128, prefill chunk 32",
    ]
    assert engine.closed
    assert "\x1b" not in err


@pytest.mark.parametrize(("stage", "said"), [("kernels", 0), ("compiling kernels", 1)])
def test_kernels_are_said_to_be_compiled_if_they_are(stage: str, said: int, capsys: pytest.CaptureFixture[str]) -> None:
    report = load_reporter(Bars())
    for done in range(4):
        report(Progress(stage=stage, done=done, total=3, unit="kernels"))
    assert capsys.readouterr().err.count("compiling 3 kernels") == said


def test_options_reach_the_engine(engine: FakeEngine) -> None:
    words = "--memory 8GiB --threads 3 --slots 20 --context 99 --max-tokens 5 --temperature 0.5 --top-k 7 --top-p 0.9"
    engine_words = "--prefetch gate --kv-type q8_0 --io-engine threads --device cpu --mirror a.gguf --mirror b.gguf"
    cache_words = "--policy static --heat h.json --trace t"
    more = "--min-p 0.1 --seed 11 --ignore-eos --stop x --stop"
    all_words = [*words.split(), *engine_words.split(), *cache_words.split(), *more.split()]
    assert run_app(["run", "m.gguf", "Tell me", *all_words, "\n\n"]) == 0
    ((path, options),) = engine.opened
    assert path == Path("m.gguf")
    assert {k: v for k, v in options.items() if k != "on_progress"} == {
        "memory": "8GiB",
        "threads": 3,
        "mirrors": (Path("a.gguf"), Path("b.gguf")),
        "stream_dense": "auto",
        "prefetch": "gate",
        "io_engine": "threads",
        "device": "cpu",
        "vram": None,
        "vram_slots": None,
        "hybrid": "auto",
        "slots": 20,
        "context": 99,
        "activations": "auto",
        "kv_type": "q8_0",
        "policy": "static",
        "heat": Path("h.json"),
        "trace": Path("t"),
    }
    sampling = Sampling(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=11)
    want = {"max_tokens": 5, "sampling": sampling, "stop": ("x", "\n\n"), "ignore_eos": True}
    assert engine.asked == [(engine.encode("Tell me"), want)]


@pytest.mark.parametrize(("context", "want"), [(4096, 256), (100, 93), (7, 1)])
def test_without_max_tokens_the_context_is_the_limit(engine: FakeEngine, context: int, want: int) -> None:
    engine.context = context
    assert run_app(["run", "Tell me"]) == (2 if context == 7 else 0)
    assert engine.asked[0][1]["max_tokens"] == want


def test_settings_out_of_range_are_refused_before_loading(engine: FakeEngine) -> None:
    assert run_app(["run", "Tell me", "--temperature", "nan"]) == 2
    assert run_app(["demo", "Tell me", "--top-p", "2"]) == 2
    assert not engine.opened


def test_the_environment_sets_defaults(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MER_MEMORY", "1GiB")
    monkeypatch.setenv("MER_THREADS", "2")
    run_app(["run", "Tell me"])
    run_app(["run", "Tell me", "--memory", "2GiB", "-t", "1"])
    assert [(o["memory"], o["threads"]) for _, o in engine.opened] == [("1GiB", 2), ("2GiB", 1)]


def test_prompts_of_other_kinds(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_app(["run", "--tokens", "3,1,4"]) == 0
    assert run_app(["run", "--chat", "Hello"]) == 0
    assert run_app(["run", "--", "-x"]) == 0
    assert engine.encoded == [[3, 1, 4], mer.Chat([mer.Message("user", "Hello")]), "-x"]
    assert run_app(["run", "--chat", "--tokens", "3"]) == 2


def test_a_chat_template_can_be_told_more(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    say = ["run", "--chat", "Hello", "--chat-template-kwargs"]
    assert run_app([*say, '{"enable_thinking": false, "reasoning_effort": "low"}']) == 0
    assert engine.encoded == [
        mer.Chat([mer.Message("user", "Hello")], {"enable_thinking": False, "reasoning_effort": "low"})
    ]
    for wrong in ("enable_thinking", "[1]", "[" * 100_000, '{"messages": true}', '{"effort": "<|im_end|>"}'):
        assert run_app([*say, wrong]) == 2
    capsys.readouterr()
    assert run_app(["run", "Hello", "--chat-template-kwargs", "{}"]) == 2
    assert "--chat-template-kwargs is for --chat" in capsys.readouterr().err
    assert len(engine.encoded) == 1


def test_the_prompt_can_come_from_standard_input(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell\nme\n"))
    assert run_app(["run", "name", "--stdin"]) == 0
    assert engine.opened[0][0] == Path("name")
    assert engine.encoded == ["Tell\nme\n"]
    assert run_app(["run", "a", "b", "--stdin"]) == 2
    assert run_app(["run", "--tokens", "1", "--stdin"]) == 2


def test_json_is_one_object(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["run", "Tell me", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("settings")["slots"] == 20
    assert printed == {
        "text": TEXT,
        "seed": None,
        "tokens": list(range(100, 109)),
        "finish_reason": "stop",
        "stats": {
            "prompt_tokens": 4,
            "reused_tokens": 0,
            "completion_tokens": 9,
            "load_s": 0.5,
            "prefill_s": 0.75,
            "decode_s": 2.0,
            "cache_hits": 30,
            "cache_misses": 10,
            "bytes_read": 1024 + 4096,
            "decode_bytes_read": 800,
            "peak_rss_bytes": 123 << 20,
            "active_threads": 2,
            "active_reason": "others have the cores",
        },
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GGUFError("m.gguf", 7, "bad"), 3),
        (UnsupportedModel("m.gguf: dense"), 3),
        (NotEnoughMemory("too small", budget_bytes=1, needed_bytes=2), 4),
        (ConfigError("slots"), 2),
        (ContextOverflow("too long"), 2),
        (TemplateError("no template"), 1),
        (ComputeError("worker died"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
)
@pytest.mark.parametrize("when", ["load_error", "error"])
def test_exit_codes(
    engine: FakeEngine, error: MerError | OSError, code: int, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setattr(engine, when, error)
    assert run_app(["run", "Tell me"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert f"mer: {error}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["run"], ["run", "x", "--bogus"], ["run", "x", "--threads", "two"], ["run", "a", "b", "c"]],
)
def test_usage_errors(arguments: list[str], engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mer: ")
    assert not engine.opened


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["run", "--help"], ["plan", "--help"], ["inspect", "-h"], ["demo", "--help"]):
        assert run_app(arguments) == 0
        assert "mer" in capsys.readouterr().out
    assert run_app(["--version"]) == 0
    assert capsys.readouterr().out.strip() == VERSION


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_ctrl_c_stops_and_prints_statistics(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    engine.hangs_after, engine.on_hang = 3, press
    assert run_app(["run", "Tell me"]) == 130
    out, err = capsys.readouterr()
    assert out == "Once upon a\n"
    assert "3 tokens (interrupted)" in err
    assert "lookups hit" in err
    assert engine.closed
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_json_says_so(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.hangs_after, engine.on_hang = 2, press
    assert run_app(["run", "Tell me", "--json"]) == 130
    object_ = json.loads(capsys.readouterr().out)
    assert (object_["text"], object_["tokens"], object_["finish_reason"]) == ("Once upon", [100, 101], "interrupted")
    assert object_["stats"]["prompt_tokens"] == 4


def test_ctrl_c_before_the_first_token(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.hangs_after, engine.on_hang = 0, press
    assert run_app(["run", "Tell me"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "0 tokens (interrupted)\n" in err


def test_ctrl_c_while_loading(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.hangs_loading, engine.on_hang = True, press
    assert run_app(["run", "Tell me"]) == 130
    assert "interrupted while loading" in capsys.readouterr().err


class Left(BaseException):
    """Stands for the end of the process."""


def test_the_second_ctrl_c_leaves_at_once(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise Left

    monkeypatch.setattr(interrupt, "leave_now", leave)

    def press_twice() -> None:
        press()
        with pytest.raises(Left):
            press()

    engine.hangs_after, engine.on_hang = 1, press_twice
    assert run_app(["run", "Tell me"]) == 130


def test_the_second_ctrl_c_ends_the_process_without_cleaning_up() -> None:
    settings = json.dumps({"hangs_after": 1, "presses_twice": True})
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.fake_main", settings, "run", "x"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "Once")
    assert done.stderr.endswith("pressing\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["run", "x"], ["run", "x", "--json"], ["inspect", "--tensors"], ["--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as gone:
        done = subprocess.run(
            [sys.executable, "-m", "tests.cli.fake_main", "{}", *arguments],
            stdout=gone, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr
    assert "Exception ignored" not in done.stderr


def in_terminal(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run the command with a fake engine in a pseudo-terminal; return its exit code and what the screen got."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        command = [sys.executable, "-W", "error", "-m", "tests.cli.fake_main", "{}", *arguments]
        os.execve(sys.executable, command, os.environ | environment)
    screen = bytearray()
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # EIO is how Linux reports that the other side is closed
            break
        if not chunk:
            break
        screen += chunk
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), screen.decode()


def test_a_terminal_sees_bars_the_prompt_and_no_escape_of_the_model() -> None:
    code, screen = in_terminal(["run", "Tell me"], {"TERM": "xterm-256color"})
    assert code == 0
    assert "dense weights" in screen
    assert "\x1b[?25h" in screen, "the cursor stays hidden"
    assert "Tell me" in screen
    assert screen.index("Tell me") < screen.index("Once upon")
    assert "\ufffd[31mred end" in screen
    assert "\x1b[31mred" not in screen


def test_no_color_is_respected() -> None:
    code, screen = in_terminal(["run", "Tell me"], {"TERM": "xterm-256color", "NO_COLOR": "1"})
    assert code == 0
    assert "\x1b[3" not in screen.replace("\x1b[?", "")
    assert "38;" not in screen


def test_a_dumb_terminal_gets_no_bars() -> None:
    code, screen = in_terminal(["run", "Tell me"], {"TERM": "dumb"})
    assert code == 0
    assert "\u2501" not in screen
    assert "tokens/s" in screen


@pytest.fixture
def main_exit(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Any]:
    def run(arguments: list[str]) -> Any:
        monkeypatch.setattr(sys, "argv", ["mer", *arguments])
        with pytest.raises(SystemExit) as exit_:
            mer_main()
        return exit_.value.code

    from mer.cli import main as mer_main

    return run


def test_the_entry_point_exits_with_the_code(main_exit: Callable[[list[str]], Any], engine: FakeEngine) -> None:
    assert main_exit(["run", "x"]) == 0
    engine.error = TemplateError("none")
    assert main_exit(["run", "x"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_closed_standard_streams_are_no_error(closed: list[int]) -> None:
    shell = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    command = f'"{sys.executable}" -m tests.cli.fake_main "{{}}" run x {shell}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert done.stdout == ("" if 1 in closed else TEXT + "\n")
    assert ("tokens/s" in done.stderr) is (2 not in closed)
