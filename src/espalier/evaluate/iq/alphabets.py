"""Letters, each alphabet in two halves: what is trained on has none of what is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

Split = Literal["train", "test"]
T = TypeVar("T")

_LATIN = "abcdefghijklmnopqrstuvwxyz"
# By language. Alphabets that share letters begin with them, so that a letter is in the same half of each.
LETTERS = {
    "en": _LATIN,
    "de": _LATIN + "äöü",
    "fr": _LATIN + "àâçéèêëîïôùûœ",
    "el": "αβγδεζηθικλμνξοπρστυφχψω",
    "ru": "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "ar": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "ja": "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん",
    "ko": "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후",
    "zh": "天地人山水火木金土日月星云风雨雪春夏秋冬东西南北花草树鸟鱼马牛羊红黄蓝白黑石田门车船书笔刀弓",
}
# What names of classes are made of.
SYMBOLS = _LATIN + _LATIN.upper() + "0123456789" + "$&#%@*+="


def half(values: Sequence[T], split: Split) -> Sequence[T]:
    """The first, third, fifth, ... are for training, the others for testing: of letters as of words and names."""
    return values[split == "test" :: 2]
