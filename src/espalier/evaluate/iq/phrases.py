"""What is said in each language: names, places, things, words, and the sentences that they are put into.

Of every list the first, third, ... entry is for training and the others for testing, as with letters. Sentences are
such that any name or place fits into them unchanged; places are invented.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """A language's lists, and its sentences with their gaps.

    words          none is a part of another
    topics         things of a kind
    meanings       of each class of each task that has classes, to be put after a symbol
    raise_letters  where letters are small or capital
    gap            between two sentences
    """

    names: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    words: tuple[str, ...]
    filler: tuple[str, ...]
    topics: tuple[tuple[str, ...], ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]

    answer: str
    text: str
    goes: str
    takes: str
    drops: str
    where: str
    keys: str
    key: str
    which_key: str
    count: str
    replace_word: str
    likes: str
    older: str
    says: str
    symbols: str
    meanings: dict[str, dict[str, str]]
    raise_letters: str = ""
    gap: str = " "


_NAMES = ("Mara", "Olin", "Petra", "Jonas", "Selma", "Viktor", "Ines", "Tobias", "Ruth", "Emil", "Nora", "Kasper")
_PLACES = (
    *("Velmar", "Tarsk", "Odrin", "Kellow", "Prassen", "Imbary"),
    *("Zunder", "Loftis", "Garne", "Wexley", "Sundra", "Hobrick"),
)

PHRASES = {
    "en": Phrases(
        names=_NAMES,
        places=_PLACES,
        things=(
            *("the lamp", "the rope", "the cup", "the drum", "the map", "the coin"),
            *("the hat", "the flute", "the knife", "the basket", "the mirror", "the blanket"),
        ),
        words=(
            *("kite", "stone", "river", "candle", "orange", "window", "thunder", "paper", "silver", "garden"),
            *("button", "forest", "hammer", "pillow", "rocket", "spoon", "tiger", "velvet", "whisper", "yellow"),
        ),
        filler=(
            "The tram was late again that morning.",
            "Someone had left a window open upstairs.",
            "Rain fell on the roofs until noon.",
            "The shop at the corner sold only brushes.",
            "A dog slept under the long table.",
            "Nobody knew who had painted the fence.",
            "The bells rang twice and then were silent.",
            "Old letters lay in a box by the stairs.",
            "Two boats went slowly up the canal.",
            "The soup was hot and the bread was dark.",
        ),
        topics=(
            ("rain", "snow", "fog", "hail"),
            ("bread", "cheese", "rice", "soup"),
            ("chess", "football", "tennis", "poker"),
            ("jazz", "opera", "tango", "blues"),
            ("iron", "copper", "silver", "gold"),
            ("cats", "horses", "goats", "pigs"),
        ),
        praise=("wonderful", "excellent", "delightful", "superb", "lovely", "splendid"),
        blame=("dreadful", "awful", "terrible", "horrible", "miserable", "disgusting"),
        goes="{name} went to {place}.",
        takes="{name} picked up {thing}.",
        drops="{name} put down {thing}.",
        answer="Answer:",
        text="Text {number}: {text}",
        where="Where is {what}?",
        keys="A few keys are hidden in this text. Remember them.",
        key="Key {number} is {value}.",
        which_key="What is key {number}?",
        count="Count from {start} to {end} in steps of {step}.",
        raise_letters="Write every small letter of the input as a capital and leave the rest as it is.",
        replace_word='Replace every "{old}" of the input by "{new}" and leave the rest as it is.',
        likes="{name} likes {what}.",
        older="{name} is older than {other}.",
        says='"It is {what}", says {name}.',
        symbols="Answer with one of these symbols: {symbols}.",
        meanings={
            "topic": {"same": "if both like things of one kind", "different": "if they like things of two kinds"},
            "entailment": {"follows": "if text 2 follows from text 1", "contradicts": "if text 2 contradicts text 1"},
            "sentiment": {"praise": "for praise", "blame": "for blame"},
        },
    ),
    "de": Phrases(
        names=_NAMES,
        places=_PLACES,
        things=(
            *("die Lampe", "das Seil", "die Tasse", "die Trommel", "die Karte", "das Geld"),
            *("das Hemd", "die Geige", "das Messer", "die Kiste", "das Glas", "die Decke"),
        ),
        words=(
            *("Drachen", "Stein", "Wasser", "Kerze", "Orange", "Fenster", "Donner", "Papier", "Silber", "Garten"),
            *("Knopf", "Wald", "Hammer", "Kissen", "Rakete", "Gabel", "Tiger", "Samt", "Brunnen", "Wiese"),
        ),
        filler=(
            "Die Bahn kam an jenem Morgen wieder zu spät.",
            "Oben hatte jemand ein Fenster offen gelassen.",
            "Bis zum Mittag fiel Regen auf die Dächer.",
            "Im Laden an der Ecke gab es nur Bürsten.",
            "Unter dem langen Tisch schlief ein Hund.",
            "Niemand wusste, wer den Zaun gestrichen hatte.",
            "Die Glocken läuteten zweimal und schwiegen dann.",
            "In einer Schachtel bei der Treppe lagen alte Briefe.",
            "Zwei Boote fuhren langsam den Kanal hinauf.",
            "Die Suppe war heiß und das Brot dunkel.",
        ),
        topics=(
            ("Regen", "Schnee", "Nebel", "Hagel"),
            ("Brot", "Käse", "Reis", "Suppe"),
            ("Schach", "Fußball", "Tennis", "Poker"),
            ("Jazz", "Oper", "Tango", "Blues"),
            ("Eisen", "Kupfer", "Silber", "Gold"),
            ("Katzen", "Pferde", "Ziegen", "Schweine"),
        ),
        praise=("wunderbar", "großartig", "herrlich", "hervorragend", "entzückend", "prächtig"),
        blame=("furchtbar", "grauenhaft", "schrecklich", "abscheulich", "erbärmlich", "widerlich"),
        goes="{name} ging nach {place}.",
        takes="{name} nahm {thing}.",
        drops="{name} legte {thing} hin.",
        answer="Antwort:",
        text="Text {number}: {text}",
        where="Wo ist {what}?",
        keys="In diesem Text sind einige Schlüssel versteckt. Merke sie dir.",
        key="Schlüssel {number} ist {value}.",
        which_key="Wie lautet Schlüssel {number}?",
        count="Zähle von {start} bis {end} in Schritten von {step}.",
        raise_letters="Schreibe jeden Kleinbuchstaben der Eingabe groß und lasse den Rest, wie er ist.",
        replace_word='Ersetze jedes "{old}" der Eingabe durch "{new}" und lasse den Rest, wie er ist.',
        likes="{name} mag {what}.",
        older="{name} ist älter als {other}.",
        says='"Es ist {what}", sagt {name}.',
        symbols="Antworte mit einem dieser Symbole: {symbols}.",
        meanings={
            "topic": {"same": "wenn beide Dinge einer Art mögen", "different": "wenn sie Dinge zweier Arten mögen"},
            "entailment": {
                "follows": "wenn Text 2 aus Text 1 folgt",
                "contradicts": "wenn Text 2 Text 1 widerspricht",
            },
            "sentiment": {"praise": "für Lob", "blame": "für Tadel"},
        },
    ),
    "fr": Phrases(
        names=_NAMES,
        places=_PLACES,
        things=(
            *("la lampe", "la corde", "la tasse", "le tambour", "la carte", "la monnaie"),
            *("le chapeau", "la flûte", "le couteau", "le panier", "le miroir", "la couverture"),
        ),
        words=(
            *("pierre", "bougie", "orange", "tonnerre", "papier", "argent", "jardin", "bouton", "marteau", "oreiller"),
            *("cuillère", "tigre", "velours", "murmure", "jaune", "rivage", "fusée", "forêt", "fleuve", "vitrine"),
        ),
        filler=(
            "Ce matin-là, le tramway était encore en retard.",
            "Quelqu'un avait laissé une fenêtre ouverte en haut.",
            "La pluie tomba sur les toits jusqu'à midi.",
            "Le magasin du coin ne vendait que des brosses.",
            "Un chien dormait sous la longue table.",
            "Personne ne savait qui avait peint la clôture.",
            "Les cloches sonnèrent deux fois, puis se turent.",
            "De vieilles lettres se trouvaient dans une boîte.",
            "Deux bateaux remontaient lentement le canal.",
            "La soupe était chaude et le pain était noir.",
        ),
        topics=(
            ("la pluie", "la neige", "le brouillard", "la grêle"),
            ("le pain", "le fromage", "le riz", "la soupe"),
            ("les échecs", "le football", "le tennis", "le poker"),
            ("le jazz", "l'opéra", "le tango", "le blues"),
            ("le fer", "le cuivre", "le bronze", "l'or"),
            ("les chats", "les chevaux", "les chèvres", "les cochons"),
        ),
        praise=("merveilleux", "superbe", "délicieux", "magnifique", "charmant", "splendide"),
        blame=("affreux", "horrible", "terrible", "lamentable", "épouvantable", "ignoble"),
        goes="{name} va à {place}.",
        takes="{name} prend {thing}.",
        drops="{name} pose {thing}.",
        answer="Réponse :",
        text="Texte {number} : {text}",
        where="Où est {what} ?",
        keys="Quelques clés sont cachées dans ce texte. Retiens-les.",
        key="La clé {number} est {value}.",
        which_key="Quelle est la clé {number} ?",
        count="Compte de {start} à {end} par pas de {step}.",
        raise_letters="Écris chaque minuscule de l'entrée en majuscule et laisse le reste tel quel.",
        replace_word='Remplace chaque "{old}" de l\'entrée par "{new}" et laisse le reste tel quel.',
        likes="{name} aime {what}.",
        older="{name} dépasse {other} en âge.",
        says='"C\'est {what}", dit {name}.',
        symbols="Réponds par l'un de ces symboles : {symbols}.",
        meanings={
            "topic": {
                "same": "si les deux aiment des choses d'un même genre",
                "different": "si les deux aiment des choses de genres différents",
            },
            "entailment": {
                "follows": "si le texte 2 découle du texte 1",
                "contradicts": "si le texte 2 contredit le texte 1",
            },
            "sentiment": {"praise": "pour un éloge", "blame": "pour un blâme"},
        },
    ),
    "zh": Phrases(
        names=("小明", "丽丽", "建国", "阿强", "晓梅", "志远", "秀英", "大伟", "思思", "国栋", "雅琴", "海涛"),
        places=(
            "云塔镇",
            "白沙坡",
            "青石渡",
            "雾林口",
            "红枫岭",
            "月牙湾",
            "铁炉堡",
            "银杏村",
            "芦花荡",
            "鹿鸣谷",
            "玉泉井",
            "黑松崖",
        ),
        things=("台灯", "绳子", "杯子", "铜鼓", "地图", "硬币", "帽子", "长笛", "小刀", "竹篮", "镜子", "毯子"),
        words=(
            *("风筝", "石头", "河流", "蜡烛", "橙子", "窗户", "雷声", "纸张", "白银", "花园"),
            *("纽扣", "森林", "锤子", "枕头", "火箭", "勺子", "老虎", "丝绒", "低语", "黄色"),
        ),
        filler=(
            "那天早上电车又晚点了。",
            "楼上有人忘了关窗。",
            "雨一直下到中午。",
            "街角的店只卖刷子。",
            "一只狗睡在长桌下面。",
            "没有人知道是谁刷了篱笆。",
            "钟响了两声就安静了。",
            "楼梯旁的盒子里放着旧信。",
            "两条船慢慢地沿运河而上。",
            "汤很热，面包很黑。",
        ),
        topics=(
            ("雨", "雪", "雾", "冰雹"),
            ("面包", "奶酪", "米饭", "汤"),
            ("象棋", "足球", "网球", "扑克"),
            ("爵士", "歌剧", "探戈", "民谣"),
            ("铁", "铜", "银", "金"),
            ("猫", "马", "山羊", "猪"),
        ),
        praise=("好极了", "真精彩", "太美妙了", "非常出色", "十分可爱", "令人赞叹"),
        blame=("糟透了", "真可怕", "太恶心了", "非常差劲", "十分可悲", "令人讨厌"),
        goes="{name}去了{place}。",
        takes="{name}拿起了{thing}。",
        drops="{name}放下了{thing}。",
        answer="答案：",
        text="文本{number}：{text}",
        where="{what}在哪里？",
        keys="这段文字里藏着几把钥匙，请记住它们。",
        key="第{number}把钥匙是{value}。",
        which_key="第{number}把钥匙是什么？",
        count="从{start}数到{end}，每次加{step}。",
        replace_word='把输入中的每个"{old}"换成"{new}"，其余不变。',
        likes="{name}喜欢{what}。",
        older="{name}比{other}年长。",
        says='{name}说："{what}"。',
        symbols="请用以下符号之一回答：{symbols}。",
        gap="",
        meanings={
            "topic": {"same": "两人喜欢同一类东西", "different": "两人喜欢不同类的东西"},
            "entailment": {"follows": "由文本1可以推出文本2", "contradicts": "文本2与文本1矛盾"},
            "sentiment": {"praise": "表示赞扬", "blame": "表示批评"},
        },
    ),
}
