"""Someone who knows every rule and reads the prompt alone: what it finds, the prompt determines."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from espalier.evaluate.iq.phrases import PHRASES, Phrases

Solver = Callable[[str, Phrases], str]


def pattern(sentence: str) -> re.Pattern:
    """What reads a sentence's gaps back."""
    gaps = re.split(r"\{(\w+)\}", sentence)
    return re.compile(
        "".join(f"(?P<{part}>.+?)" if number % 2 else re.escape(part) for number, part in enumerate(gaps))
    )


def pairs(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """The examples, and the input whose output is asked for."""
    inputs, outputs = (re.findall(rf"^{name}:(?: (.*))?$", prompt, re.M) for name in ("Input", "Output"))
    assert outputs.pop() == "" and len(inputs) == len(outputs) + 1
    return list(zip(inputs, outputs, strict=False)), inputs[-1]


def counting(prompt: str, said: Phrases) -> str:
    rule, shown = prompt.split("\n")
    start, end, step = map(int, pattern(said.count).fullmatch(rule).group("start", "end", "step"))
    terms = [int(term) for term in shown.rstrip(",").split(", ")]
    assert terms == list(range(start, end + 1, step))[:3]
    return ", ".join(map(str, range(terms[-1] + step, end + 1, step)))


def replace_lowercase(prompt: str, said: Phrases) -> str:
    return pairs(prompt)[1].upper()


def replace_word(prompt: str, said: Phrases) -> str:
    examples, last = pairs(prompt)
    old, new = re.findall('"(.+?)"', prompt)
    assert all(given.replace(old, new) == made for given, made in examples)
    return last.replace(old, new)


def head_and_tail(prompt: str, said: Phrases | None) -> str:
    examples, last = pairs(prompt)
    fitting = None
    for given, made in examples:
        places = [place for place in range(len(made)) if made.startswith(given, place)]
        found = {(made[:place], made[place + len(given) :]) for place in places}
        fitting = found if fitting is None else fitting & found
    [(head, tail)] = fitting
    return head + last + tail


def full_repeating(prompt: str, said: Phrases | None) -> str:
    examples, last = pairs(prompt)
    assert all(made == given * 2 for given, made in examples)
    return last * 2


def head_slicing(prompt: str, said: Phrases | None) -> str:
    examples, last = pairs(prompt)
    [kept] = {len(made) for _, made in examples}
    assert all(given[:kept] == made for given, made in examples)
    return last[:kept]


def multiple_key_retrieval(prompt: str, said: Phrases) -> str:
    asked = pattern(said.which_key).search(prompt)["number"]
    [value] = re.findall(said.key.format(number=asked, value="([0-9]{5})"), prompt)
    return value


def supporting_facts(prompt: str, said: Phrases) -> str:
    """Follow everybody and everything through the story."""
    kinds = {kind: pattern(getattr(said, kind)) for kind in ("goes", "takes", "drops")}
    story, question, _ = prompt.rsplit("\n", 2)
    place, carried, lying = {}, {}, {}
    for sentence in re.findall(r".+?[.。]", story):
        for kind, reader in kinds.items():
            if told := reader.fullmatch(sentence.strip()):
                name = told["name"]
                if kind == "goes":
                    place[name] = told["place"]
                elif kind == "takes":
                    carried[told["thing"]] = name
                else:
                    assert carried.pop(told["thing"]) == name
                    lying[told["thing"]] = place[name]
                break
        else:
            raise AssertionError(sentence)
    what = pattern(said.where).fullmatch(question)["what"]
    return place.get(carried.get(what, what)) or lying[what]


def mapped(label_of: Callable[[list[str], Phrases], str]) -> Solver:
    """Reads from the examples which symbol stands for which class."""

    def solver(prompt: str, said: Phrases) -> str:
        symbols, last = {}, ""
        instruction, *blocks = prompt.split("\n\n")
        for block in blocks:
            *lines, answer = block.split("\n")
            texts = [pattern(said.text).fullmatch(line)["text"] for line in lines]
            symbol, label = answer.removeprefix(said.answer).strip(), label_of(texts, said)
            assert not symbol or (symbols.setdefault(label, symbol) == symbol and symbol in instruction)
            last = label
        assert symbol == ""
        return symbols[last]

    return solver


def topic(texts: list[str], said: Phrases) -> str:
    liked = [pattern(said.likes).fullmatch(text)["what"] for text in texts]
    first, second = (next(kind for kind in said.topics if what in kind) for what in liked)
    return "same" if first == second else "different"


def entailment(texts: list[str], said: Phrases) -> str:
    older = [reader.groups() for reader in pattern(said.older).finditer(texts[0])]
    assert len(older) == 2
    pairs = {tuple(name.strip() for name in pair) for pair in older}
    pairs |= {(a, d) for a, b in pairs for c, d in pairs if b == c}
    name, other = pattern(said.older).fullmatch(texts[1]).groups()
    assert ((name, other) in pairs) != ((other, name) in pairs)
    return "follows" if (name, other) in pairs else "contradicts"


def sentiment(texts: list[str], said: Phrases) -> str:
    what = pattern(said.says).fullmatch(texts[0])["what"]
    assert (what in said.praise) != (what in said.blame)
    return "praise" if what in said.praise else "blame"


SOLVERS: dict[str, Solver] = {
    "topic": mapped(topic),
    "entailment": mapped(entailment),
    "sentiment": mapped(sentiment),
    "counting": counting,
    "replace_lowercase": replace_lowercase,
    "replace_word": replace_word,
    "head_and_tail": head_and_tail,
    "full_repeating": full_repeating,
    "head_slicing": head_slicing,
    "multiple_key_retrieval": multiple_key_retrieval,
    "single_supporting_fact": supporting_facts,
    "two_supporting_facts": supporting_facts,
}


@pytest.fixture(scope="session")
def solve() -> Callable[[str, str, str], str]:
    """The answer to a task's prompt in a language."""
    return lambda task, prompt, language: SOLVERS[task](prompt, PHRASES.get(language))
