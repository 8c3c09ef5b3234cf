"""Texts that tokenizers often get wrong, made from a seed."""

# ruff: noqa: RUF001  # look-alike characters are wanted here

import random
from collections.abc import Callable, Sequence

_MARKS = "\u0300\u0301\u0308\u0327\u0323\u0338\u20d0\u0e49\u0e31\u093c\u094d\u0651\u064e\u05b8\u302a\u3099"
_FACES = (
    "😀",
    "👩\u200d👩\u200d👧\u200d👦",
    "👨🏿\u200d🚀",
    "🏳️\u200d🌈",
    "🇫🇷🇯🇵",
    "1️⃣",
    "☺\ufe0e",
    "☺️",
    "🫱🏻\u200d🫲🏿",
    "🏴\U000e0067\U000e0062\U000e007f",
)
_RARE = "ꙮ𒀱𓂀𝔘𝕏𐍈🜁⟁ℵ㋿𠮷𪚥ᚠ⠿𑀓ꦏᏣ𞤀\u0378\U0001fffe\U000e0001ſẞŉǅ\u0345İıΣς"
_CJK = "你好世界漢字かなカナﾊﾝｶｸ한국어조선글ㄱㅏ、。「」！？　〇々〆ヶ"
_RTL = "שָׁלוֹם مرحبا بالعالم ۱۲۳ پارسی\u200f\u200e\u202b\u202c"
_LATIN = "éèêëñçåøßæœþðıłžščřůįąęœ\u00adǆǉﬁﬂ½¼²³ªº№™€£¥©®"
_INDIC = "नमस्ते क्षत्रिय தமிழ் ไทยภาษา ລາວ မြန်မာ ខ្មែរ తెలుగు සිංහල"
_CYRILLIC = "Привет мир ЁёЙй Їїґ ЎўЂђ Ελληνικά Ἀθῆναι Հայերեն ქართული"
_CONTROL = "".join(map(chr, (*range(32), 0x7F, *range(0x80, 0xA0))))
_INVISIBLE = (
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u061c\u180e\u2066\u2069\ufe0f\ufe00\U000e0100\u2028\u2029"
    "\u0085\u00a0\u3000\u2003\u202f"
)
_PRIVATE = "\ue000\uf8ff\U000f0000\U0010fffd\uffff\ufffe\ufffd\ufdd0"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—–‘’“”«»¿¡§¶•·‰′″"
_CONTRACTIONS = ("don't", "I'LL", "we'Ve", "it'ſ", "they're", "'S", "O'Neil's", "l'été", "'d've", "y'all'd", "you’re")
_WORDS = (
    "the",
    "Hello",
    "HELLO",
    "camelCaseWord",
    "snake_case_word",
    "naïve",
    "Straße",
    "ǅungla",
    "iPhone15Pro",
    "x86_64",
    "ßẞ",
    "McDonald",
    "aBCd",
    "ŒUVRE",
)
_CODE = (
    "def f(x):\n\tif x:\n\t\treturn x  # é\n",
    "    for (int i = 0; i < n; ++i) {\n        a[i] += 1;\n    }\n",
    "\n\n\n",
    "\r\n\r\n",
    " \n \n\t\n",
    "SELECT * FROM t WHERE a='b';",
    "</div>\n<table><tr>",
    '{"k": [1, 2.5e-10, null]}',
    "\\u00e9\\n\\x00",
    "a==b!=c<=d>>=e&&f||g",
    "https://ex.am/p?q=1&r=%20#f",
    "<h1>Title</h1>",
    "// TODO\r\n",
    "x**2/3//4%5",
    "/* c */\n\n\n\n",
)
_SPELLINGS = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<bos>",
    "<eos>",
    "<0x41>",
    "<0xE4>",
    "<0x0A>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<|end|>",
    "<unused7>",
    "<mask>",
    "<think>",
    "</think>",
    "<tool_call>",
    "▁",
    "▁▁▁",
    "Ġ",
    "Ċ",
    "<|im_",
    "end|>",
    "<<|im_end|>>",
)


def _run(characters: str, most: int) -> Callable[[random.Random], str]:
    return lambda rng: "".join(rng.choices(characters, k=rng.randint(1, most)))


def _one(choices: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(choices)


def _combined(rng: random.Random) -> str:
    return rng.choice("aeiounksمאनกㄱ漢 ") + "".join(rng.choices(_MARKS, k=rng.randint(1, 4)))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices(rng.choice(("0123456789", "٠١٢٣٤", "０１２３", "१२३", "²³¹", "ⅣⅧ", "01 ,.")), k=rng.randint(1, 24)))


def _any_character(rng: random.Random) -> str:
    code = rng.choice((rng.randint(0, 0x2FF), rng.randint(0, 0xFFFF), rng.randint(0, 0x10FFFF)))
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def _spaces(rng: random.Random) -> str:
    return rng.choice((" ", " ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000")) * rng.choice((1, 1, 2, 3, 5, 17, 33, 70))


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _one(_FACES), _combined, _run(_RARE, 3), _run(_CJK, 8), _run(_RTL, 10), _run(_LATIN, 6), _run(_INDIC, 10), _run(_CYRILLIC, 10),
    _run(_CONTROL, 3), _run(_INVISIBLE, 3), _run(_PRIVATE, 2), _run(_PUNCTUATION, 6), _one(_CONTRACTIONS), _one(_WORDS),
    _one(_WORDS), _one(_CODE), _one(_SPELLINGS), _digits, _any_character, _spaces, _spaces, _one(" "), _one(" "),
    _run("abcdefghijklmnopqrstuvwxyz", 9), _run("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5),
)  # fmt: skip


def odd_strings(count: int, seed: int = 4) -> list[str]:
    """Make `count` strings. The first is empty; each of the others joins 1 to 12 random parts of `_KINDS`."""
    rng = random.Random(seed)
    made = ("".join(rng.choice(_KINDS)(rng) for _ in range(rng.randint(1, 12))) for _ in range(count - 1))
    return ["", *made]
