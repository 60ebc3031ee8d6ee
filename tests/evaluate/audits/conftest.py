"""A model whose heads are known: one selects the option that was asked for, and what it copies becomes the letter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from espalier import files
from espalier.evaluate.audits.heads import attention_layers
from espalier.evaluate.audits.reading import Reader
from espalier.evaluate.audits.synthetic import WORDS

BARE = "{options}{question}"
VOCABULARY = (*WORDS, "A", "B", "C", "D", "E", "F", ".", "\n")
HEADS, HEAD, POSITIONS = 5, 64, 48
# Where in the hidden state is what: this token, its place, the token before, the one three before, what is copied.
TOKEN, PLACE, BEFORE, THREE_BEFORE, COPIED = 0, 56, 104, 160, 216
SELECTS = (1, 3)


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A token a word, letter, full stop or newline; spaces are none."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordLevel(ids, unk_token="."))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\.|\n"), behavior="removed", invert=True)
    return made


@pytest.fixture
def planted() -> PreTrainedModel:
    """GPT-2 with three heads that do something: 0.0 copies the token before, 0.1 the one three before, and 1.3 finds
    the newline whose word before it is this token and copies the letter three before that newline."""
    sizes = {"n_embd": HEADS * HEAD, "n_layer": 2, "n_head": HEADS, "n_inner": 8, "n_positions": POSITIONS}
    special = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=len(VOCABULARY), tie_word_embeddings=False, **sizes, **special)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.eye(len(VOCABULARY))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wte.weight[:, TOKEN : TOKEN + len(VOCABULARY)] = tokens
        model.transformer.wpe.weight[:, PLACE : PLACE + POSITIONS] = torch.eye(POSITIONS)
        for head, (back, into) in enumerate(((1, BEFORE), (3, THREE_BEFORE))):
            earlier = 5 * torch.eye(POSITIONS).roll(-back, 1)
            _head(model, 0, head, (PLACE, earlier), (PLACE, torch.eye(POSITIONS)), (TOKEN, tokens), into)
        _head(model, *SELECTS, (TOKEN, 5 * tokens), (BEFORE, tokens), (THREE_BEFORE, tokens), COPIED)
        model.lm_head.weight[:, COPIED : COPIED + len(VOCABULARY)] = tokens
    model.set_attn_implementation("eager")
    return model


def _head(model: PreTrainedModel, layer: int, head: int, query, key, value, into: int) -> None:
    """Write a head that sees these parts of the hidden state, each (where, how it is mapped), and where it writes."""
    attention = model.transformer.h[layer].attn
    for part, (where, mapped) in enumerate((query, key, value)):
        column = part * HEADS * HEAD + head * HEAD
        rows, columns = mapped.shape
        attention.c_attn.weight[where : where + rows, column : column + columns] = mapped
    size = value[1].shape[1]
    attention.c_proj.weight[head * HEAD : head * HEAD + size, into : into + size] = torch.eye(size)


@pytest.fixture
def reader(planted, words):
    """Reads the planted model."""

    def reader(**told) -> Reader:
        told = {"template": BARE, "cloze": "{question}", "token": "eol", "vectors": "normed"} | told
        return Reader(planted, attention_layers(planted), words, **told)

    return reader


@pytest.fixture
def planted_folder(planted, words, tmp_path) -> Path:
    """The planted model as a folder."""
    folder = tmp_path / "planted"
    planted.save_pretrained(folder)
    words.save(str(folder / "tokenizer.json"))
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return folder
