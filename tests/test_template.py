"""A chat template writes what transformers writes with it, and can't take more time or memory than it is given."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from espalier import template as module
from espalier.errors import ModelError, ResourceError
from espalier.template import Template

CLEAN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": " héllo "}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def load(tmp_path):
    """A tokenizer whose chat template is given, as transformers opens it."""

    def load(text: str):
        ids = {token: number for number, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        Tokenizer(models.BPE(ids, [])).save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<end>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "chat_template.jinja").write_text(text)
        return AutoTokenizer.from_pretrained(tmp_path)

    return load


@pytest.fixture
def opened(load, tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda text: stack.enter_context(contextlib.closing(Template(load(text), tmp_path)))


def children() -> list[psutil.Process]:
    return psutil.Process().children()


@pytest.mark.parametrize("prompt", [True, False])
def test_it_writes_what_transformers_writes(opened, load, prompt):
    template = opened(CLEAN)
    expected = load(CLEAN).apply_chat_template(ASKED, tokenize=False, add_generation_prompt=prompt)
    assert [template.write(ASKED, prompt=prompt) for _ in range(3)] == [expected] * 3
    assert "héllo" in expected


def test_a_child_that_is_stopped_is_not_waited_for(opened, monkeypatch):
    template, before = opened(CLEAN), set(children())
    template.write(ASKED, prompt=False)
    (child,) = set(children()) - before
    child.suspend()  # its own bound can't end it then
    later = threading.Timer(5.0, child.resume)
    later.start()
    monkeypatch.setattr(module, "SECONDS", 0.1)
    with pytest.raises(ModelError, match="chat template"):
        template.write(ASKED, prompt=False)
    later.cancel()


def test_what_a_template_refuses_is_said_in_its_words_and_the_next_is_written(opened):
    template = opened(CLEAN)
    with pytest.raises(ValueError, match="no x"):
        template.write([{"role": "x", "content": ""}], prompt=False)
    for given in ("text", None, [1], [{"role": "user"}], {"a": 1}):
        with contextlib.suppress(ValueError):
            template.write(given, prompt=False)
    with pytest.raises(TypeError):
        template.write([{"role": "user", "content": b"bytes"}], prompt=False)
    assert template.write(ASKED[:1], prompt=False) == "<end><user>héllo\n"


LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd") + "{% endfor %}" * 4
DOUBLED = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"


@pytest.mark.parametrize("text", [LOOPS, "{{ 10**(10**10) }}", "{{ messages[0].content * 10**10 }}", DOUBLED])
def test_a_template_without_end_is_ended_and_named(opened, monkeypatch, tmp_path, text):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    template, began, before = opened(text), time.monotonic(), set(children())
    for _ in range(2):
        with pytest.raises(ModelError) as refused:
            template.write(ASKED, prompt=False)
        assert refused.value.where == f"{tmp_path}: chat template" and "more than 0.5 s" in refused.value.found
    assert time.monotonic() - began < 20
    assert set(children()) <= before


def test_closing_ends_the_child_and_twice_does_no_harm(opened):
    template, before = opened(CLEAN), set(children())
    template.write(ASKED, prompt=False)
    assert len(set(children()) - before) == 1
    template.close()
    template.close()
    assert set(children()) <= before


def test_the_child_holds_none_of_the_parents_files(opened, tmp_path):
    template, before = opened(CLEAN), set(children())
    with (tmp_path / "lock").open("w") as held:
        template.write(ASKED, prompt=False)
        (child,) = set(children()) - before
        there = {str(link.readlink()) for link in Path(f"/proc/{child.pid}/fd").iterdir()}
        assert held.name not in there


def test_a_template_gets_little_memory_beyond_what_the_process_has(opened):
    template = opened("{{ (messages[0].content * 200000000) | length }}")
    with pytest.raises(ModelError, match="1 GiB of memory"):
        template.write([{"role": "user", "content": "x" * 60}], prompt=False)
    assert template.write([{"role": "user", "content": "x"}], prompt=False) == "200000000"


@pytest.mark.parametrize("text", [CLEAN, LOOPS])
def test_the_child_ends_with_its_parent_whatever_it_does(load, tmp_path, monkeypatch, text):
    monkeypatch.setattr(module, "SECONDS", 1.0)
    tokenizer = load(text)
    readable, writable = os.pipe()
    middle = os.fork()
    if not middle:
        template = Template(tokenizer, tmp_path)
        template._start()
        os.write(writable, str(template._child.pid).encode())
        threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()
        template.write(ASKED, prompt=False)
        time.sleep(5)
    os.waitpid(middle, 0)
    child = int(os.read(readable, 20))
    os.close(readable)
    os.close(writable)
    end = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_child_that_others_end_is_started_once_more_and_then_told(opened, monkeypatch):
    template, before = opened(CLEAN), set(children())
    text = template.write(ASKED, prompt=False)
    (child,) = set(children()) - before
    child.kill()
    child.wait()
    assert template.write(ASKED, prompt=False) == text
    template.close()
    monkeypatch.setattr(module, "_written", lambda *asked: os.kill(os.getpid(), 9))
    with pytest.raises(ResourceError, match="signal 9, twice"):
        template.write(ASKED, prompt=False)
    assert set(children()) <= before


def test_a_fork_that_fails_leaves_nothing_to_close(opened, monkeypatch):
    template = opened(CLEAN)

    def fork():
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(OSError, match="allocate"):
        template.write(ASKED, prompt=False)
    template.close()


def test_an_interrupted_question_does_not_leave_its_answer_to_the_next(opened, monkeypatch):
    template = opened("{{ messages[0].content }}")
    template.write(ASKED, prompt=False)
    poll = template._pipe.poll

    def interrupted(seconds):
        poll(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(template._pipe, "poll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.write([{"role": "user", "content": "first"}], prompt=False)
    monkeypatch.undo()
    assert template.write([{"role": "user", "content": "second"}], prompt=False) == "second"


def test_only_files_that_are_open_are_closed(opened, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: pytest.fail("the bound may be 1e9"))
    assert opened("x").write(ASKED, prompt=False) == "x"
