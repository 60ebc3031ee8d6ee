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
    "ja": (
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"
        "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン"
    ),
    # Syllables of one consonant and one vowel.
    "ko": "".join(chr(0xAC00 + 588 * consonant + 28 * vowel) for consonant in range(19) for vowel in range(0, 21, 3)),
    "zh": (
        "天地人山水火木金土日月星云风雨雪春夏秋冬东西南北花草树鸟鱼马牛羊红黄蓝白黑石田门车船书笔刀弓"
        "大小多少上下左右前后里外高低长短一二三四五六七八九十百千万父母子女男王臣民兵士工农医生手足口耳目心身头面"
        "衣食住行走来去坐立见闻思言"
    ),
}
# What names of classes are made of.
SYMBOLS = _LATIN + _LATIN.upper() + "0123456789" + "$&#%@*+="


def half(values: Sequence[T], split: Split) -> Sequence[T]:
    """The first, third, fifth, ... are for training, the others for testing: of letters as of words and names."""
    return values[split == "test" :: 2]
