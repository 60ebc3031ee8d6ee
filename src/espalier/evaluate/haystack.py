"""Hay and needles: dull sentences without end, and a fact to hide among them, in several languages."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from espalier import files
from espalier.errors import DataError


@dataclass(frozen=True)
class Language:
    """How a language says what is hidden, asks for it, and talks of nothing.

    needle     a sentence about {place} and {number}
    question   the same sentence up to the number, as the end of a prompt: the model is to write on
    number     how the number continues the question, so that it is cut into tokens as it would be written
    intro      what the model is told before the hay
    places     what may be asked for
    hay        three lists, a sentence being one of each joined by `between`
    """

    needle: str
    question: str
    number: str
    intro: str
    places: tuple[str, ...]
    hay: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    between: str = " "

    def sentences(self, draw: random.Random) -> Iterator[str]:
        """Sentences about nothing, without end."""
        while True:
            yield self.between.join(draw.choice(part) for part in self.hay)


LANGUAGES = {
    "en": Language(
        needle="The secret number of {place} is {number}.",
        question="The secret number of {place} is",
        number=" {number}",
        intro="Somewhere in this text there is a secret number. Remember it.",
        places=(
            "Oslo",
            "Lima",
            "Cairo",
            "Kyoto",
            "Perth",
            "Quito",
            "Riga",
            "Dakar",
            "Turin",
            "Boston",
            "Delhi",
            "Porto",
        ),
        hay=(
            ("The old gardener", "A quiet neighbour", "My younger cousin", "The evening train", "Every second baker"),
            ("walked slowly past", "often thinks about", "never quite forgot", "once painted", "used to look after"),
            (
                "the green fence.",
                "a bowl of apples.",
                "the road by the lake.",
                "three wooden chairs.",
                "the first snow.",
            ),
        ),
    ),
    "de": Language(
        needle="Die geheime Zahl von {place} ist {number}.",
        question="Die geheime Zahl von {place} ist",
        number=" {number}",
        intro="Irgendwo in diesem Text steht eine geheime Zahl. Merke sie dir.",
        places=(
            "Oslo",
            "Lima",
            "Kairo",
            "Kyoto",
            "Perth",
            "Quito",
            "Riga",
            "Dakar",
            "Turin",
            "Bremen",
            "Delhi",
            "Porto",
        ),
        hay=(
            (
                "Der alte Gärtner",
                "Eine stille Nachbarin",
                "Mein jüngerer Vetter",
                "Der Zug am Abend",
                "Jeder zweite Bäcker",
            ),
            (
                "ging langsam vorbei an",
                "träumt manchmal von",
                "erzählte wieder von",
                "wusste nichts von",
                "kam zurück zu",
            ),
            (
                "dem grünen Zaun.",
                "den roten Äpfeln.",
                "der Straße am See.",
                "drei Stühlen aus Holz.",
                "dem ersten Schnee.",
            ),
        ),
    ),
    "fr": Language(
        needle="Le nombre secret de {place} est {number}.",
        question="Le nombre secret de {place} est",
        number=" {number}",
        intro="Quelque part dans ce texte se trouve un nombre secret. Retiens-le.",
        places=(
            "Lyon",
            "Lima",
            "Nantes",
            "Kyoto",
            "Perth",
            "Quito",
            "Riga",
            "Dakar",
            "Turin",
            "Boston",
            "Delhi",
            "Porto",
        ),
        hay=(
            (
                "Le vieux jardinier",
                "Une voisine discrète",
                "Mon jeune cousin",
                "Le train du soir",
                "Un boulanger sur deux",
            ),
            (
                "passait lentement devant",
                "pense souvent à",
                "revenait toujours vers",
                "regardait de loin",
                "évitait autrefois",
            ),
            (
                "la clôture verte.",
                "la coupe de pommes.",
                "la route du lac.",
                "la chaise de bois.",
                "la première neige.",
            ),
        ),
    ),
    "zh": Language(
        needle="{place}的秘密数字是{number}。",
        question="{place}的秘密数字是",
        number="{number}",
        intro="这段文字里藏着一个秘密数字，请记住它。",
        places=("奥斯陆", "利马", "开罗", "京都", "珀斯", "基多", "里加", "达喀尔", "都灵", "波士顿", "德里", "波尔图"),
        hay=(
            ("年老的园丁", "安静的邻居", "我的表弟", "傍晚的火车", "街角的面包师"),
            ("慢慢地走过", "时常想起", "从来没有忘记", "曾经画过", "一直照看着"),
            ("那道绿色的篱笆。", "一碗苹果。", "湖边的小路。", "三把木椅子。", "第一场雪。"),
        ),
        between="",
    ),
}


def sentences_of(path: Path) -> list[str]:
    """The sentences of a text file: what a full stop and the like, or a line, ends."""
    mend = "Name another file, or leave text out to have hay made."
    text = files.read_text(path, expected="a text file", mend=mend)
    found = [part.strip() for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text)]
    sentences = [part for part in found if part]
    if not sentences:
        raise DataError(str(path), found="no text", expected="hay", mend="Name another file.")
    return sentences
